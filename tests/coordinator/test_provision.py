import json
import zipfile
from datetime import timedelta

import pytest

from fedseg.config import load_experiment
from fedseg.coordinator.folders import locked
from fedseg.coordinator.provision import standing
from fedseg.errors import ConfigError, FedsegError, KitError
from fedseg.kit import load_kit, load_roster
from tests.coordinator.studies import contents


def test_every_machine_gets_a_kit_that_opens(study):
    done = study.provision()
    assert done.written == ("coordinator", "Aare", "Elbe")
    for kit in (load_kit(study.coordinator), load_kit(study.site("Aare")), load_kit(study.site("Elbe"))):
        assert kit.config.study == "liver"
        assert (kit.config.host, kit.config.port) == ("localhost", 8443)
        assert kit.fingerprint == done.fingerprint
        assert kit.app.read_bytes() == study.app.read_bytes()
        assert load_experiment(kit.experiment).name == "tiny"
    assert [site.name for site in load_roster(study.coordinator / "sites.json").sites] == ["Aare", "Elbe"]


def test_private_keys_are_closed_to_others_and_the_authority_is_in_no_kit(study):
    study.provision()
    keys = sorted(study.kits.rglob("*.key"))
    assert [key.parent.name for key in keys] == ["authority", "authority", "coordinator", "coordinator", "Aare", "Elbe"]
    assert {path.stat().st_mode & 0o777 for path in [*keys, *study.kits.rglob("*.zip")]} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in [study.kits, *(key.parent for key in keys)]} == {0o700}
    secrets = [(study.kits / "authority" / name).read_bytes() for name in ("ca.key", "signing.key")]
    for packed in study.kits.rglob("*.zip"):
        with zipfile.ZipFile(packed) as archive:
            held = {name: archive.read(name) for name in archive.namelist()}
        assert not set(secrets) & set(held.values())
        own = (packed.with_suffix("") / "kit.toml").read_bytes()
        assert held[f"{packed.stem}/kit.toml"] == own


def test_a_zip_unpacks_to_the_kit_with_its_modes(study, tmp_path):
    study.provision()
    with zipfile.ZipFile(study.kits / "sites" / "Aare.zip") as archive:
        modes = {entry.filename: entry.external_attr >> 16 & 0o777 for entry in archive.infolist()}
        archive.extractall(tmp_path / "unpacked")
    assert modes["Aare/site.key"] == 0o600
    assert modes["Aare/"] == 0o700
    unpacked = tmp_path / "unpacked" / "Aare"
    (unpacked / "site.key").chmod(0o600)
    assert load_kit(unpacked).config.site == "Aare"
    assert {name for name, _ in contents(unpacked).items()} == set(contents(study.site("Aare")))


def test_a_second_run_changes_nothing(study):
    study.provision()
    before = contents(study.kits)
    assert study.provision(days=3).written == ()
    assert contents(study.kits) == before


def test_a_new_site_leaves_the_other_kits_and_the_authority_as_they_are(study):
    study.provision()
    before = contents(study.kits)
    assert study.provision("Aare", "Elbe", "Loire", days=10).written == ("Loire", "coordinator")
    after = contents(study.kits)
    changed = {name for name in before if after[name] != before[name]}
    coordinators = {"sites.json", "nginx.conf", "manifest.json", "manifest.sig"}
    assert changed == {f"coordinator/{name}" for name in coordinators} | {"coordinator.zip", "authority/roster.json"}
    assert {site.name for site in load_roster(study.coordinator / "sites.json").sites} == {"Aare", "Elbe", "Loire"}
    assert load_kit(study.coordinator).config.role == "coordinator"


def test_a_renewed_site_gets_new_keys_and_its_old_certificate_is_revoked(study):
    study.provision()
    before = contents(study.kits)
    old = load_roster(study.coordinator / "sites.json").sites[0]
    assert study.provision(days=300, renew=["Aare"]).written == ("Aare", "coordinator")
    new = load_roster(study.coordinator / "sites.json").sites[0]
    assert new.name == old.name == "Aare"
    assert new.serial != old.serial
    assert new.public_key != old.public_key
    assert new.not_after - old.not_after == timedelta(days=300)
    assert load_kit(study.site("Aare"))
    ledger, _ = standing(study.kits, study.now)
    assert [certificate.serial for certificate in ledger.revoked()] == [old.serial]
    after = contents(study.kits)
    assert {name for name in before if name.startswith("sites/Elbe") and after[name] != before[name]} == set()


def test_a_revoked_site_is_no_longer_admitted_but_keeps_its_folder(study):
    study.provision()
    kit = contents(study.site("Aare"))
    study.provision(days=1, revoke=["Aare"])
    roster = load_roster(study.coordinator / "sites.json")
    assert [site.name for site in roster.admitted(study.now)] == ["Elbe"]
    assert contents(study.site("Aare")) == kit
    assert "Aare;" not in (study.coordinator / "nginx.conf").read_text()
    assert study.provision(days=2).warnings == ("Aare is revoked; --renew Aare would admit it again",)
    study.provision(days=3, renew=["Aare"])
    assert len(load_roster(study.coordinator / "sites.json").admitted(study.now)) == 2


def test_the_servers_certificates_are_renewed_together(study):
    study.provision()
    before, (ledger, _) = contents(study.coordinator), standing(study.kits, study.now)
    (study.coordinator / "approved.json").write_text("kept")
    assert study.provision(days=300, renew=["coordinator"]).written == ("coordinator",)
    after = contents(study.coordinator)
    for name in ("server.crt", "server.key", "loopback.crt", "loopback.key"):
        assert after[name] != before[name]
    assert (study.coordinator / "approved.json").read_text() == "kept"
    renewed, _ = standing(study.kits, study.now)
    assert {old.serial for old in renewed.revoked()} == {ledger.server.serial, ledger.loopback.serial}
    assert load_kit(study.coordinator)


def test_a_site_that_left_the_study_file_is_warned_of_and_not_touched(study):
    study.provision()
    before = contents(study.kits)
    assert study.provision("Elbe").warnings == (
        "Aare is not in the study file, but may still connect; use --revoke Aare",
    )
    assert contents(study.kits) == before


def test_certificates_that_expire_soon_are_warned_of(study):
    study.provision()
    assert study.provision(days=334).warnings == ()
    soon = study.provision(days=336).warnings
    assert len(soon) == 3
    assert "the certificate of Aare expires in 29 days" in soon[0]
    assert "--renew Aare" in soon[0]
    assert "has expired" in study.provision(days=366).warnings[0]


def test_a_certificate_that_the_authority_cuts_short_is_warned_of(study):
    study.provision()
    warnings = study.provision(days=3400, renew=["Aare", "Elbe", "coordinator"]).warnings
    assert [warning for warning in warnings if "no certificate lasts longer than the authority" in warning]
    with pytest.raises(KitError, match="has expired; start again in another folder"):
        study.provision(days=3651)


def test_institutions_may_be_written_in_any_script(study):
    study.provision({"name": "Aare", "institution": "Universitätsspital Zürich", "contact": "東京"})
    assert "Universitätsspital Zürich" in (study.site("Aare") / "README.md").read_text()
    assert load_roster(study.coordinator / "sites.json").sites[0].institution == "Universitätsspital Zürich"
    assert load_kit(study.site("Aare"))


def test_what_changed_for_everybody_is_refused_until_all_kits_are_updated(study):
    study.provision()
    before, experiment = contents(study.kits), study.folder / "experiment.toml"
    experiment.write_text(experiment.read_text().replace("rounds = 2", "rounds = 3"))
    study.write("Aare", "Elbe", port="9443")
    with pytest.raises(ConfigError, match=r"host and port and the experiment changed.*--update"):
        study.provision()
    assert contents(study.kits) == before
    done = study.provision(update=True, app=study.app)
    assert done.written == ("coordinator", "Aare", "Elbe")
    for name in ("Aare", "Elbe"):
        kit = load_kit(study.site(name))
        assert kit.config.port == 9443
        assert load_experiment(kit.experiment).federation.rounds == 3
        for kept in ("site.crt", "site.key"):
            assert contents(study.site(name))[kept] == before[f"sites/{name}/{kept}"]
    assert done.ledger.revoked() == []


def test_another_name_of_the_server_needs_another_certificate(study):
    study.provision()
    study.write("Aare", "Elbe", names='["10.0.0.1"]')
    with pytest.raises(ConfigError, match=r"coordinator\.names.*--renew coordinator"):
        study.provision()
    assert study.provision(renew=["coordinator"]).written == ("coordinator",)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"renew": ["Rhone"]}, "--renew Rhone: the study file has no such site; it has Aare, Elbe"),
        ({"revoke": ["Rhone"]}, "--revoke Rhone: no such site has a kit; sites with a kit: Aare, Elbe"),
        ({"revoke": ["coordinator"]}, "use --renew coordinator"),
        ({"renew": ["Aare"], "revoke": ["Aare"]}, "--renew alone revokes the old certificate"),
    ],
)
def test_names_that_mean_nothing_are_refused(study, options, told):
    study.provision()
    before = contents(study.kits)
    with pytest.raises(ConfigError, match=told):
        study.provision(**options)
    assert contents(study.kits) == before


def test_kits_are_not_mixed_with_those_of_another_study(study):
    study.provision()
    study.write("Aare", "Elbe", name='"spleen"')
    with pytest.raises(ConfigError, match=r"of the study 'liver', not 'spleen'; use another folder"):
        study.provision()


@pytest.mark.parametrize("lost", ["ca.key", "ca.crt", "signing.key", "signing.pub", "roster.json", "crl.pem"])
def test_an_incomplete_authority_is_never_made_anew(study, lost):
    study.provision()
    (study.kits / "authority" / lost).unlink()
    before = contents(study.kits)
    with pytest.raises(KitError, match=rf"authority: {lost} missing; bring the folder back from a backup"):
        study.provision()
    assert contents(study.kits) == before


def test_kits_without_their_authority_are_not_overwritten(study):
    study.provision()
    (study.kits / "authority").rename(study.folder / "elsewhere")
    before = contents(study.kits)
    with pytest.raises(KitError, match="authority: is missing"):
        study.provision()
    assert contents(study.kits) == before


def test_a_kit_that_was_handed_over_and_deleted_is_not_made_again(study):
    study.provision()
    (study.site("Aare")).rename(study.folder / "handed-over")
    (study.kits / "sites" / "Aare.zip").unlink()
    assert study.provision(days=1).written == ()
    with pytest.raises(KitError, match="Aare: is missing; bring it back, or add --renew Aare"):
        study.provision(update=True, app=study.app)
    assert study.provision(renew=["Aare"]).written == ("Aare", "coordinator")


def test_changed_files_of_the_coordinator_are_put_right_not_signed(study):
    study.provision()
    roster = study.coordinator / "sites.json"
    document = json.loads(roster.read_text())
    document["sites"][0]["certificate_sha1"] = "0" * 40
    roster.write_text(json.dumps(document))
    with pytest.raises(FedsegError, match=r"sites\.json: is not the file that the coordinator signed"):
        load_kit(study.coordinator)
    assert study.provision().written == ("coordinator",)
    assert load_kit(study.coordinator)
    assert load_roster(roster).sites[0].certificate_sha1 != "0" * 40


def test_folders_that_are_no_kits_are_left_alone(study):
    for name in ("coordinator", "sites/Aare"):
        place = study.kits / name
        place.mkdir(parents=True)
        (place / "site.toml").write_text("somebody's")
        hidden = study.kits / ".other.old"
        hidden.mkdir(exist_ok=True)
        with pytest.raises(KitError, match=f"{name}: is there already, and is no kit of this study"):
            study.provision(app=study.app)
        assert (place / "site.toml").read_text() == "somebody's"
        assert hidden.exists()
        (place / "site.toml").unlink()
        place.rmdir()
    assert study.provision(app=study.app).written == ("Aare", "Elbe", "coordinator")


def test_two_provisionings_at_once_are_refused(study):
    with locked(study.kits), pytest.raises(KitError, match="another `fedseg provision` is at work there"):
        study.provision()
    assert study.provision().written


def test_a_folder_that_cannot_be_written_is_a_readable_error(study):
    study.kits.write_text("a file")
    with pytest.raises(KitError, match="kits: cannot be written"):
        study.provision()


def test_disturbed_writing_is_a_readable_error_and_can_be_repeated(study):
    study.provision()
    blocked = study.kits / "sites" / "Loire.zip"
    blocked.mkdir()
    with pytest.raises(KitError, match=r"Loire\.zip.*give the same command again"):
        study.provision("Aare", "Elbe", "Loire")
    blocked.rmdir()
    assert study.provision().written == ("Loire", "coordinator")
    assert load_kit(study.site("Loire"))


def test_a_server_that_moves_gets_a_certificate_and_all_sites_its_new_address(study):
    study.provision()
    study.write("Aare", "Elbe", host='"fl.example.org"')
    with pytest.raises(ConfigError, match="add --update"):
        study.provision()
    with pytest.raises(ConfigError, match="add --renew coordinator"):
        study.provision(update=True, app=study.app)
    study.provision(update=True, renew=["coordinator"], app=study.app)
    assert {load_kit(study.site(name)).config.host for name in ("Aare", "Elbe")} == {"fl.example.org"}
