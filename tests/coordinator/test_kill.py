"""Kill -9 at any moment of a provisioning: whoever runs the same command again ends with whole kits and a true ledger."""

import multiprocessing
import os
import signal
import zipfile
from datetime import timedelta

import pytest

from fedseg.coordinator.provision import standing
from fedseg.credentials import load_certificate
from fedseg.kit import load_kit, load_roster
from tests.coordinator.studies import Studies, contents

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fedseg.coordinator.provision", "fedseg.models.registry", "hypothesis", "pytest"])
FIRST = {"sites": ("Aare", "Elbe")}
ADD = {"sites": ("Aare", "Elbe", "Loire")}
RENEW = {"sites": ("Aare", "Elbe"), "days": 100, "renew": ["Aare", "coordinator"]}
REVOKE = {"sites": ("Aare", "Elbe"), "days": 100, "revoke": ["Aare"]}
UPDATE = {"sites": ("Aare", "Elbe"), "days": 100, "update": True}


def run(folder, now, options, fault):
    """In a process of its own."""
    os.environ["FEDSEG_FAULT"] = fault
    study = Studies(folder)
    study.now = now
    provision(study, options)


def provision(study, options):
    options = dict(options)
    return study.provision(*options.pop("sites"), app=study.app, **options)


def killed(study, options, fault):
    """Whether the process was killed before it had ended."""
    process = CONTEXT.Process(target=run, args=(study.folder, study.now, options, fault))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def check(study, sites):
    roster = {site.name: site for site in load_roster(study.coordinator / "sites.json").sites}
    ledger, _ = standing(study.kits, study.now)
    assert set(roster) == set(sites)
    for folder in (study.coordinator, *(study.site(name) for name in sites)):
        kit = load_kit(folder)
        certificate = load_certificate(kit.certificate)
        known = ledger.server if kit.config.site is None else roster[kit.config.site]
        assert known.serial == f"{certificate.serial_number:x}"
        with zipfile.ZipFile(folder.with_name(f"{folder.name}.zip")) as archive:
            packed = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist() if name[-1] != "/"}
        assert packed == {name: content for name, (_, content) in contents(folder).items()}
    assert [path for path in study.kits.rglob(".*") if path.name != ".lock"] == []


@pytest.mark.parametrize(
    ("options", "point"),
    [
        (FIRST, "folder-written"),
        (FIRST, "folder-in-place"),
        (FIRST, "checkpoint-written"),
        (ADD, "folder-in-place"),
        (RENEW, "folder-moved"),
        (RENEW, "folder-in-place"),
        (RENEW, "checkpoint-written"),
        (REVOKE, "checkpoint-written"),
        (UPDATE, "folder-moved"),
        (UPDATE, "checkpoint-written"),
    ],
)
def test_a_killed_run_can_be_repeated(tmp_path, options, point):
    for count in range(1, 20):
        folder = tmp_path / str(count)
        folder.mkdir()
        study = Studies(folder)
        if options is not FIRST:
            provision(study, FIRST)
        if not killed(study, options, f"{point}:{count}"):
            break
        provision(study, options)
        check(study, options["sites"])
        again = contents(study.kits)
        assert study.provision(days=options.get("days", 0)).written == ()
        assert contents(study.kits) == again
    assert count > 1


def test_a_renewal_that_was_killed_is_finished_by_a_plain_run(tmp_path):
    study = Studies(tmp_path)
    provision(study, FIRST)
    old = load_certificate(study.site("Aare") / "site.crt")
    assert killed(study, {"sites": ("Aare", "Elbe"), "days": 100, "renew": ["Aare"]}, "folder-in-place")
    assert study.provision(days=100).written == ("Aare", "coordinator")
    check(study, ("Aare", "Elbe"))
    ledger, _ = standing(study.kits, study.now)
    assert [issued.serial for issued in ledger.revoked()] == [f"{old.serial_number:x}"]
    assert ledger.revoked()[0].revoked == study.now + timedelta(days=100)
