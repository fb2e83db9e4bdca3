import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.variants import DEPLOY, UNITS, unit

HIGHEST = {
    "fedseg-site-service": 1.0,
    "fedseg-site-metrics": 1.5,
    "fedseg-gate": 1.5,
    "fedseg-coordinator": 1.5,
    "fedseg-nginx": 2.0,
}
each = pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is absent")
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)


@each
def test_systemd_understands_every_line(path: Path, tmp_path: Path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / path.name
    copy.write_text(re.sub(r"^(ExecStart\w*=)\S+", rf"\g<1>{program}", path.read_text(), flags=re.MULTILINE))
    for other in UNITS:
        if other.name != path.name:
            (tmp_path / other.name).write_text(f"[Service]\nExecStart={program}\n")
    done = analyze("verify", "--man=no", str(copy))
    said = [line for line in done.stderr.splitlines() if path.stem in line]
    assert said == []


@each
def test_a_unit_is_as_closed_as_the_readme_says(path: Path):
    done = analyze("security", "--offline=true", "--no-pager", f"--threshold={HIGHEST[path.stem] * 10:.0f}", str(path))
    assert done.returncode == 0, done.stdout


def test_the_site_service_has_no_network_and_reads_its_data_only():
    service = unit("fedseg-site-service")
    assert service["PrivateNetwork"] == ["yes"]
    assert service["RestrictAddressFamilies"] == ["AF_UNIX"]
    assert service["IPAddressDeny"] == ["any"]
    assert service["ReadOnlyPaths"] == ["/data"]
    assert service["ProtectSystem"] == ["strict"]
    assert service["ReadWritePaths"] == ["/run/fedseg"]


def test_the_gate_sees_neither_data_nor_cache_nor_state():
    gate = unit("fedseg-gate")
    (data,) = unit("fedseg-site-service")["ReadOnlyPaths"]
    hidden = {path.lstrip("-") for line in gate["InaccessiblePaths"] for path in line.split()}
    assert {data, "/var/cache/fedseg", "/var/lib/fedseg"} <= hidden
    assert "SupplementaryGroups" not in gate
    assert gate["PrivateDevices"] == ["yes"]


def test_gate_and_service_cannot_look_into_each_other_though_they_share_a_user():
    for name in ("fedseg-gate", "fedseg-site-service"):
        settings = unit(name)
        assert settings["User"] == ["fedseg"]
        assert settings["PrivateUsers"] == ["yes"]
        assert settings["CapabilityBoundingSet"] == [""]
        assert any("@debug" in line for line in settings["SystemCallFilter"])


def test_the_coordinator_speaks_to_loopback_only_and_nginx_cannot_read_its_state():
    coordinator = unit("fedseg-coordinator")
    assert coordinator["IPAddressDeny"] == ["any"]
    assert coordinator["IPAddressAllow"] == ["localhost"]
    assert unit("fedseg-nginx")["InaccessiblePaths"] == ["-/var/lib/fedseg"]


@each
def test_a_unit_runs_as_a_user_who_is_not_root_and_stays_so(path: Path):
    settings = unit(path.stem)
    assert settings["User"] == ["fedseg"]
    assert settings["NoNewPrivileges"] == ["yes"]
    users = (DEPLOY / "systemd" / "fedseg.sysusers.conf").read_text()
    assert re.search(r"^u fedseg - .*nologin$", users, re.MULTILINE)
