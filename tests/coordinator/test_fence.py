import re
import shutil
import subprocess
from datetime import timedelta

import pytest

from fedseg.coordinator.fence import FLEET_CALLS, TRANSFERS, flower_key, nginx_configuration
from fedseg.kit import load_roster
from tests.coordinator.studies import NOW, Studies


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    studies = Studies(tmp_path_factory.mktemp("fence"))
    studies.provision("Aare", "Elbe", "Loire")
    studies.provision("Aare", "Elbe", "Loire", revoke=["Elbe"])
    return studies.kits


def configuration(kits, **options):
    roster = load_roster(kits / "coordinator" / "sites.json")
    return nginx_configuration(kits / "coordinator", roster, "fl.example.org", 8443, **{"now": NOW} | options)


def test_only_sites_that_may_connect_are_in_it_each_with_its_own_key(kits):
    roster = {site.name: site for site in load_roster(kits / "coordinator" / "sites.json").sites}
    listed = re.findall(r'"([0-9a-f]{40}) (\S+)" (\w+);', configuration(kits))
    assert {name for _, _, name in listed} == {"Aare", "Loire"}
    for fingerprint, key, name in listed:
        assert (fingerprint, key) == (roster[name].certificate_sha1, flower_key(roster[name]))


def test_a_site_whose_certificate_has_expired_is_left_out(kits):
    assert not re.findall(r'"([0-9a-f]{40}) ', configuration(kits, now=NOW + timedelta(days=4000)))


def test_no_path_but_those_of_a_registered_node_is_passed_on(kits):
    text = configuration(kits, superlink_port=18123)
    patterns = re.findall(r"location ~ (\S+) {", text)
    assert "location / {\n            return 403;" in text
    for path in (
        "/v1/control/list-runs",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/get-run/x",
        "/",
    ):
        assert not any(re.search(pattern, path) for pattern in patterns), path
    for call in (*FLEET_CALLS, *TRANSFERS):
        assert any(re.search(pattern, f"/v1/fleet/{call}") for pattern in patterns), call
    assert "server 127.0.0.1:18123;" in text


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
@pytest.mark.parametrize("listen", ["0.0.0.0", "127.0.0.1", "::1"])
def test_nginx_takes_it(kits, tmp_path, listen):
    (kits / "coordinator" / "nginx.conf").write_text(configuration(kits, listen=listen))
    command = ["nginx", "-t", "-c", str(kits / "coordinator" / "nginx.conf"), "-p", f"{tmp_path}/"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
