import json

import pytest
from prometheus_client import CollectorRegistry

from fedseg.coordinator.exporter import CATALOGUE
from fedseg.coordinator.machine import MachineCollector
from fedseg.kit import load_kit, load_roster
from fedseg.members import Member, write_who
from tests.coordinator.studies import Studies


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    studies = Studies(tmp_path_factory.mktemp("machine"))
    studies.provision("Aare", "Elbe")
    studies.provision("Aare", "Elbe", revoke=["Elbe"])
    return load_kit(studies.coordinator)


def registry(kit, state):
    found = CollectorRegistry()
    found.register(MachineCollector(kit, state))
    return found


def test_every_certificate_that_counts_has_its_date(kit, tmp_path):
    found = registry(kit, tmp_path)
    expected = {site.name: site.not_after.timestamp() for site in load_roster(kit.roster).sites}
    name = "fedseg_certificate_expiry_timestamp_seconds"
    assert found.get_sample_value(name, {"certificate": "Aare"}) == expected["Aare"]
    assert found.get_sample_value(name, {"certificate": "Elbe"}) is None, "it is revoked"
    assert found.get_sample_value(name, {"certificate": "server.crt"}) is not None


def test_room_restarts_and_connections_are_told(kit, tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({"restarts": {"run": 2, "superlink": 0}}))
    write_who(tmp_path / "sites.json", {7: Member("Aare", 0.0)})
    found = registry(kit, tmp_path)
    assert found.get_sample_value("fedseg_restarts_total", {"program": "run"}) == 2
    assert found.get_sample_value("fedseg_site_connected", {"site": "Aare"}) == 0
    assert 0 < found.get_sample_value("fedseg_state_free_bytes") <= found.get_sample_value("fedseg_state_size_bytes")
    names = {family.name for family in found.collect()}
    assert names == {series.name for series in CATALOGUE.values() if "run" not in series.labels}


def test_a_study_that_is_just_beginning_shows_what_there_is(kit, tmp_path):
    names = {family.name for family in registry(kit, tmp_path).collect()}
    assert names == {
        "fedseg_certificate_expiry_timestamp_seconds",
        "fedseg_state_free_bytes",
        "fedseg_state_size_bytes",
    }
