import base64
import hashlib
import json
import re
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedseg.coordinator.authority import key_pem, new_key, public_pem
from fedseg.errors import FedsegError, KitError
from fedseg.kit import (
    FILES,
    KitConfig,
    Manifest,
    Roster,
    certificate_days_left,
    load_kit,
    load_roster,
    parse_document,
    split_address,
)
from tests.coordinator.studies import NOW, Studies

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    """The kits of a study with two sites; not to be changed."""
    study = Studies(tmp_path_factory.mktemp("study"))
    study.provision("Aare", "Elbe")
    return study


@pytest.fixture
def kit(kits, tmp_path):
    """A kit of Aare to change at will."""
    return shutil.copytree(kits.site("Aare"), tmp_path / "Aare")


@pytest.fixture
def server_kit(kits, tmp_path):
    """A kit of the server to change at will."""
    return shutil.copytree(kits.coordinator, tmp_path / "coordinator")


def sign_again(folder, change):
    """What a forger would do: change the manifest and sign it with a key of one's own."""
    manifest = json.loads((folder / "manifest.json").read_text())
    key = ed25519.Ed25519PrivateKey.generate()
    (folder / "signing.pub").write_bytes(public_pem(key.public_key()))
    manifest["files"]["signing.pub"]["sha256"] = sha256(folder / "signing.pub")
    change(manifest)
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / "manifest.sig").write_bytes(base64.b64encode(key.sign(content)))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_kit_knows_its_files(kits):
    site, server = load_kit(kits.site("Aare")), load_kit(kits.coordinator)
    assert (site.certificate.name, site.key.name) == ("site.crt", "site.key")
    assert (server.certificate.name, server.key.name) == ("server.crt", "server.key")
    for kit in (site, server):
        for path in (kit.ca, kit.certificate, kit.key, kit.experiment, kit.app, kit.signing_key):
            assert path.is_file()
    assert server.roster.is_file()


def test_the_fingerprint_is_what_openssl_and_sha256sum_say(kits):
    key = serialization.load_pem_public_key((kits.site("Aare") / "signing.pub").read_bytes())
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    told = load_kit(kits.site("Aare")).fingerprint
    assert told.removeprefix("SHA256:").replace("-", "") == hashlib.sha256(der).hexdigest()
    assert told.startswith("SHA256:")


@pytest.mark.parametrize("name", sorted(FILES["site"]))
def test_a_changed_file_is_refused_by_name(kit, name):
    content = bytearray((kit / name).read_bytes())
    content[len(content) // 2] ^= 1
    (kit / name).write_bytes(content)
    with pytest.raises(KitError, match=name.replace(".", r"\.") if name != "signing.pub" else r"signing\.pub|manifest"):
        load_kit(kit)


@pytest.mark.parametrize("name", [*sorted(FILES["coordinator"]), "manifest.json", "manifest.sig", "server.key"])
def test_a_missing_file_is_refused_by_name(server_kit, name):
    (server_kit / name).unlink()
    with pytest.raises(KitError, match=rf"{name.replace('.', '[.]')}: is missing"):
        load_kit(server_kit)


def test_a_changed_manifest_or_signature_is_refused(kit):
    signature = (kit / "manifest.sig").read_bytes()
    for damaged in (b"", b"\xff\xfe", b"not base64", base64.b64encode(b"short"), signature[:-3]):
        (kit / "manifest.sig").write_bytes(damaged)
        with pytest.raises(KitError, match=r"manifest\.json: was not signed"):
            load_kit(kit)
    (kit / "manifest.sig").write_bytes(signature)
    manifest = (kit / "manifest.json").read_text()
    (kit / "manifest.json").write_text(manifest.replace('"Aare"', '"Elbe"'))
    with pytest.raises(KitError, match=r"manifest\.json: was not signed"):
        load_kit(kit)


def test_a_forged_kit_has_another_fingerprint(kit, kits):
    (kit / "app.fab").write_bytes(b"malice")
    sign_again(kit, lambda manifest: manifest["files"]["app.fab"].update(sha256=sha256(kit / "app.fab")))
    assert load_kit(kit).fingerprint != load_kit(kits.site("Aare")).fingerprint


@pytest.mark.parametrize("name", sorted(FILES["site"]))
def test_a_manifest_that_leaves_a_file_out_is_refused(kit, name):
    sign_again(kit, lambda manifest: manifest["files"].pop(name))
    with pytest.raises(KitError, match=f"does not list {name}"):
        load_kit(kit)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sites.json", "weights.safetensors", ""])
def test_a_file_that_no_kit_has_is_refused(kit, name):
    sign_again(kit, lambda manifest: manifest["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    with pytest.raises(KitError, match="which no kit of a site has"):
        load_kit(kit)


@pytest.mark.parametrize(
    ("name", "of", "told"),
    [
        ("kit.toml", "Elbe", "is of another kit than manifest.json"),
        ("site.crt", "Elbe", "names Elbe, kit.toml Aare"),
        ("site.crt", "stranger", "was not issued by ca.crt"),
    ],
)
def test_a_kit_put_together_from_others_is_refused(kit, kits, tmp_path, name, of, told):
    (tmp_path / "other").mkdir()
    other = Studies(tmp_path / "other")
    other.provision("stranger")
    shutil.copy((kits if of == "Elbe" else other).site(of) / name, kit / name)
    sign_again(kit, lambda manifest: manifest["files"][name].update(sha256=sha256(kit / name)))
    with pytest.raises(KitError, match=told):
        load_kit(kit)


def test_files_that_the_manifest_does_not_list_are_left_alone(kit):
    (kit / "site.toml").write_text("whatever the hospital likes")
    (kit / "approved.json").write_text("[]")
    assert load_kit(kit).config.site == "Aare"


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o602])
def test_a_private_key_that_others_can_read_is_refused_with_the_remedy(kit, mode):
    (kit / "site.key").chmod(mode)
    with pytest.raises(KitError, match=rf"mode {mode:o}\); run: chmod 600 .*site\.key"):
        load_kit(kit)
    assert load_kit(kit, with_keys=False).config.site == "Aare"


def test_another_private_key_is_refused(kit, kits):
    for content, told in (
        ((kits.site("Elbe") / "site.key").read_bytes(), "is not the key of site.crt"),
        (key_pem(ed25519.Ed25519PrivateKey.generate()), "is not the key of site.crt"),
        (b"nothing", "is not a private key in PEM"),
        (
            new_key().private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
            ),
            "is in the format of OpenSSH, not PKCS#8; run: ssh-keygen -p -m PKCS8 -f ",
        ),
        (
            new_key().private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"secret"),
            ),
            "has a passphrase; run: openssl pkey",
        ),
    ):
        (kit / "site.key").write_bytes(content)
        with pytest.raises(KitError, match=rf"site\.key: {re.escape(told)}"):
            load_kit(kit)


def test_days_left_are_counted_from_now(kits):
    certificate = kits.site("Aare") / "site.crt"
    assert certificate_days_left(certificate, NOW) == 365
    assert certificate_days_left(certificate, NOW + timedelta(days=365, hours=12)) == -0.5
    with pytest.raises(KitError, match="is missing"):
        certificate_days_left(kits.folder / "no.crt", NOW)


def test_a_roster_admits_who_is_neither_revoked_nor_expired(kits):
    roster = load_roster(kits.coordinator / "sites.json")
    assert [site.name for site in roster.admitted(NOW)] == ["Aare", "Elbe"]
    assert roster.admitted(NOW + timedelta(days=366)) == ()


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("fl.example.org:443", ("fl.example.org", 443)),
        ("[2001:db8::1]:1", ("2001:db8::1", 1)),
        ("10.0.0.1:65535", ("10.0.0.1", 65535)),
    ],
)
def test_addresses_are_split(address, parts):
    assert split_address(address) == parts


@pytest.mark.parametrize(
    "address",
    ["host", "host:", ":443", "host:0", "host:65536", "host:-1", "2001:db8::1:443", "[host]:443", "host:٣", "[]:1"],
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ValueError, match="must"):
        split_address(address)


def error_of(function, *arguments):
    """The message of a readable error, or nothing; any other exception is a failure."""
    try:
        function(*arguments)
    except FedsegError as error:
        return str(error)
    return None


@FUZZ
@given(st.data())
def test_damaged_kits_give_readable_errors(kits, tmp_path_factory, data):
    folder = shutil.copytree(kits.coordinator, tmp_path_factory.mktemp("fuzz") / "kit")
    name = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    content = (folder / name).read_bytes()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, len(content)))
    changed = content[:start] + data.draw(st.binary(max_size=64)) + content[end:]
    (folder / name).write_bytes(changed)
    told = error_of(load_kit, folder)
    if told is None:  # text around a PEM or base64 means nothing
        assert changed == content or name.endswith((".key", ".sig"))
    else:
        assert any(part in told for part in (name, "manifest.json", "signing.pub"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@FUZZ
@given(st.sampled_from([KitConfig, Manifest, Roster]), st.binary() | JSON.map(json.dumps).map(str.encode))
def test_documents_that_are_something_else_give_readable_errors(kind, content):
    assert (error_of(parse_document, kind, content, Path("some.json")) or "").startswith("some.json: ")


@FUZZ
@given(st.sampled_from(["kit.toml", "manifest.json"]), st.data())
def test_signed_documents_that_are_wrong_give_readable_errors(kits, tmp_path_factory, name, data):
    folder = shutil.copytree(kits.site("Aare"), tmp_path_factory.mktemp("fuzz") / "kit")
    if name == "kit.toml":
        (folder / name).write_bytes(data.draw(st.binary()))
        sign_again(folder, lambda manifest: manifest["files"][name].update(sha256=sha256(folder / name)))
    else:
        key, value = (
            data.draw(st.sampled_from(["format", "study", "role", "site", "created", "files"])),
            data.draw(JSON),
        )
        sign_again(folder, lambda manifest: manifest.update({key: value}))
    told = error_of(load_kit, folder)
    assert told is None or str(folder) in told


@FUZZ
@given(st.data())
def test_changed_rosters_are_read_or_refused(kits, tmp_path_factory, data):
    document = json.loads((kits.coordinator / "sites.json").read_text())
    place = data.draw(st.sampled_from([document, *document["sites"]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
    path = tmp_path_factory.mktemp("fuzz") / "sites.json"
    path.write_text(json.dumps(document))
    told = error_of(load_roster, path)
    assert told is None or told.startswith(str(path))
