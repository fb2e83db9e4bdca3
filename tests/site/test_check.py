import gzip
import os
import shlex
import socket
from datetime import datetime
from pathlib import Path

import pytest

from fedseg.site import check
from fedseg.site.approval import withdraw
from fedseg.site.audit import AuditLog
from fedseg.site.check import check_site
from fedseg.site.finding import Finding, Known, attention, run_check
from fedseg.site.hours import DAYS
from tests.coordinator.studies import EXPERIMENT
from tests.site.ready import ReadySite


@pytest.fixture
def site(tmp_path):
    """A hospital that has done everything right."""
    return ReadySite(tmp_path)


def findings(site, **options):
    found = check_site(site.kit, **({"network": False, "training": False} | options))
    return {finding.name: finding for finding in found}


def unlike_ok(found):
    return {name for name, finding in found.items() if finding.state != "ok"}


def test_a_site_that_has_done_everything_is_ready(site):
    found = findings(site)
    assert unlike_ok(found) == set()
    assert list(found) == [name for name, _ in check.LOCAL]
    assert "SHA256:" in found["kit"].found
    assert "telephone" in found["kit"].remedy
    assert "9 of 9 cases are usable" in found["data"].found
    assert "training: 7 cases of 7 persons, validation: 2 of 2" in found["data"].found


def test_a_check_changes_nothing_at_the_site(site):
    log = AuditLog(site.kit / "state" / "audit.jsonl")
    log.append({"event": "started"})
    before = {path: path.read_bytes() for path in site.study.folder.rglob("*") if path.is_file()}
    findings(site, training=True)
    assert {path: path.read_bytes() for path in site.study.folder.rglob("*") if path.is_file()} == before


def test_a_changed_file_of_the_kit_is_named(site):
    with (site.kit / "experiment.toml").open("a") as file:
        file.write("# a comment\n")
    found = findings(site)
    assert found["kit"].state == "not ready"
    assert "experiment.toml: is not the file that the coordinator signed" in found["kit"].found
    assert found["data"].state == "ok"
    assert found["site file"].state == "attention"


def test_a_key_that_others_can_read_stops_only_what_needs_it(site):
    (site.kit / "site.key").chmod(0o644)
    found = findings(site)
    assert unlike_ok(found) == {"kit"}
    assert found["kit"].remedy.startswith("run: chmod 600")


def test_the_kit_of_the_coordinator_is_not_one_of_a_site(site):
    found = {finding.name: finding for finding in check_site(site.study.coordinator, network=False, training=False)}
    assert "is the coordinator's kit" in found["kit"].found


def test_no_kit_at_all_is_a_table_too(tmp_path):
    found = list(check_site(tmp_path / "nowhere"))
    assert found[0].state == "not ready"
    assert "signing.pub: is missing" in found[0].found
    assert {finding.state for finding in found} == {"not ready", "attention"}


@pytest.mark.parametrize(("days", "state", "words"), [(340, "attention", "expires in"), (366, "not ready", "expired")])
def test_a_certificate_near_its_end_is_told_of(tmp_path, days, state, words):
    found = findings(ReadySite(tmp_path, days=-days, data=False))["certificate"]
    assert found.state == state
    assert words in found.found


def test_a_bundle_that_nobody_approved_is_not_ready(site):
    from fedseg.site.approval import approvals

    withdraw(site.kit, approvals(site.kit)[0].sha256)
    found = findings(site)["app bundle"]
    assert found.state == "not ready"
    assert "fedseg site approve" in found.remedy
    (site.kit / "approved.json").write_text("[")
    assert "is no list of approvals" in findings(site)["app bundle"].found


def test_a_site_file_of_another_site_is_refused(site):
    site.write(name="Elbe")
    found = findings(site)["site file"]
    assert found.state == "not ready"
    assert "name = 'Aare'" in found.remedy


def test_a_key_that_is_misspelt_in_the_site_file_is_named(site):
    site.write(thread=2)
    found = findings(site)
    assert "did you mean 'threads'" in found["site file"].found + found["site file"].remedy
    assert unlike_ok(found) == {"site file", "policy", "data", "device", "disk", "memory"}


def test_a_socket_that_cannot_be_is_told_of(site):
    site.write(socket="s" * 120)
    assert "is" in findings(site)["site file"].found
    assert findings(site)["site file"].state == "not ready"
    site.write(socket="site.toml")
    assert findings(site)["site file"].found.endswith("is another kind of file")


def test_a_service_that_runs_already_is_told_of(tmp_path, site):
    path = f"/tmp/fedseg-check-{os.getpid()}.sock"
    site.write(socket=path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        try:
            assert "a site service is running" in findings(site)["site file"].found
        finally:
            Path(path).unlink()


def test_every_rule_that_would_refuse_is_named(site):
    site.write(
        policy='models = ["rwkv-unet"]\nmax_clip_norm = 1.0\nmin_noise_multiplier = 0.5\nhours = ["Mo 03:00-03:01"]'
    )
    found = findings(site)["policy"]
    assert found.state == "not ready"
    for rule in ("policy.models", "policy.max_clip_norm", "policy.min_noise_multiplier"):
        assert rule in found.found
    assert "policy.hours" not in found.found


def test_a_policy_that_only_waits_for_its_hours_needs_attention(site):
    site.write(policy=f'hours = ["{DAYS[(datetime.now().weekday() + 3) % 7]} 00:00-24:00"]')
    found = findings(site)["policy"]
    assert (found.state, "policy.hours" in found.found) == ("attention", True)


def test_too_few_cases_are_not_ready(site):
    site.write(policy="min_cases = 8")
    found = findings(site)["data"]
    assert found.state == "not ready"
    assert "policy.min_cases wants 8 to train on" in found.found


def test_too_few_validation_cases_need_attention(site):
    site.write(policy="min_validation_cases = 3")
    found = findings(site)["data"]
    assert (found.state, "no scores would leave" in found.found) == ("attention", True)


def test_broken_cases_are_counted_and_the_others_used(site):
    broken = sorted((site.data / "imagesTr").iterdir())[0]
    broken.write_bytes(gzip.compress(b"not a volume"))
    found = findings(site)["data"]
    assert found.state == "attention"
    assert "8 of 9 cases are usable" in found.found
    assert found.remedy.startswith("fedseg data check")


def test_a_command_to_type_holds_for_folders_with_spaces(tmp_path):
    site = ReadySite(tmp_path / "a kit")
    (site.kit / "approved.json").unlink()
    sorted((site.data / "imagesTr").iterdir())[0].write_bytes(gzip.compress(b"not a volume"))
    found = findings(site)
    look, approve = found["data"].remedy, found["app bundle"].remedy.split(", then")[0]
    assert shlex.split(look)[2:] == ["check", str(site.data), "--experiment", f"{site.kit}/experiment.toml"]
    assert shlex.split(approve) == ["fedseg", "site", "approve", "--show", f"{site.kit}/app.fab"]


def test_a_cohort_that_is_mostly_broken_is_not_ready(site):
    for path in sorted((site.data / "imagesTr").iterdir())[:6]:
        path.write_bytes(b"")
    site.write(policy="min_cases = 1\nmin_validation_cases = 1")
    assert findings(site)["data"].state == "not ready"


def test_a_folder_that_is_no_cohort_is_named(site):
    site.write(data=str(site.kit))
    found = findings(site)
    assert "not a cohort" in found["data"].found
    assert found["disk"].found == "was not looked at: it needs the data, which is not ready"


def test_a_device_that_is_not_there_is_told_of(site):
    site.write(device="cuda:7")
    assert "is not there" in findings(site)["device"].found
    site.write(threads=1000)
    assert findings(site)["device"].state == "attention"


def test_a_precision_that_the_device_cannot_do_is_not_ready(tmp_path):
    site = ReadySite(tmp_path, experiment=EXPERIMENT.replace("16]", '16], precision = "fp16"'))
    site.write(device="cpu")
    assert "fp16 needs a GPU" in findings(site)["device"].found


def test_a_disk_that_is_too_small_is_told_of(tmp_path):
    fine = EXPERIMENT + "data = { spacing = [0.01, 0.01, 0.01] }"
    found = findings(ReadySite(tmp_path, experiment=fine))
    assert found["disk"].state == "not ready"
    assert found["disk"].remedy.startswith("make room in")
    assert found["memory"].state == "attention"


def test_the_estimate_of_the_cache_is_what_preparing_needs(site):
    from fedseg.config import load_experiment
    from fedseg.data.audit import audit_cohort
    from fedseg.data.cohort import read_cohort
    from fedseg.site.machine import prepared_bytes

    experiment = load_experiment(site.kit / "experiment.toml")
    audit = audit_cohort(read_cohort(site.data), experiment.task, progress=False)
    assert prepared_bytes(audit, experiment) == 9 * 16**3 * 5
    coarser = experiment.model_copy(update={"data": experiment.data.model_copy(update={"spacing": (13.0, 13.0, 13.0)})})
    assert prepared_bytes(audit, coarser) == pytest.approx(9 * 8**3 * 5)


def test_a_network_of_rwkv_wants_a_compiler(tmp_path, monkeypatch):
    experiment = EXPERIMENT.replace('name = "unet", options = { widths = [4, 8] }', 'name = "rwkv-unet"')
    site = ReadySite(tmp_path, experiment=experiment.replace("[16, 16, 16]", "[16, 32, 32]"), data=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = findings(site)["compiler"]
    assert (found.state, "no C++ compiler" in found.found) == ("attention", True)


def test_a_check_that_crashes_becomes_a_row():
    def crash(known):
        raise ZeroDivisionError("by zero")

    known = Known(None, None)
    assert run_check("x", crash, known) == Finding(
        "x",
        "not ready",
        "the check itself failed: ZeroDivisionError: by zero",
        "tell whoever maintains fedseg at your site",
    )
    assert run_check("y", lambda _: attention("a", "b"), known) == Finding("y", "attention", "a", "b")
