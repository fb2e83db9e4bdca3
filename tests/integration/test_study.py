"""A study with three hospitals, each process a real one, and everything that docs/faults.md says about what may go wrong.

One study runs through all tests of this file, in their order; each does something to it and sees the training go on.
"""

import contextlib
import json
import shutil
import signal
import ssl
import subprocess
import time
import tomllib
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.cli.build import build_fab_from_disk

from fedseg.config import load_experiment
from fedseg.coordinator.superlink import Control
from fedseg.federated.driver import Event, run_federation
from fedseg.federated.local import InProcessFleet
from fedseg.federated.networks import start_state
from fedseg.federated.sites import OpenSites
from fedseg.federated.store import RunStore
from fedseg.kit import load_kit
from fedseg.site.config import load_site
from tests.apps.hospitals import tiny_experiment
from tests.integration.outsider import CLOSED, HEARTBEAT, Credentials, Outsider, heartbeat
from tests.integration.study import PYTHON, ROOT, Study, devices, rows
from tests.prometheus import Prometheus, panel_queries, rule_metrics

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx, which is not installed"),
    pytest.mark.timeout(300),
]

UNDISTURBED = 3
DEADLINE = 15.0
PATIENCE = 120.0
NONSENSE = {
    "nan": ("refused", "non-finite"),
    "shape": ("refused", "wrong-shape"),
    "name": ("failed", "WrongName"),
    "garbage": ("failed", "MessageError"),
}
"""What `rogue.py` can send, and how it ends."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    torch.set_num_threads(1)
    experiment = tiny_experiment(rounds=400, min_sites=2, deadline=DEADLINE)
    undemanding = experiment.data.model_copy(update={"min_cases": 1})  # a site may lose one of its three cases
    distances = experiment.evaluation.model_copy(update={"surface_metrics": True})  # for the dashboard's panels
    experiment = experiment.model_copy(update={"data": undemanding, "evaluation": distances})
    study = Study(tmp_path_factory.mktemp("s"), experiment)
    study.state.mkdir()
    small_disk = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(study.state)], capture_output=True
    )
    try:
        study.start_server()
        for name in study.names:
            study.start_service(name)
            study.start_gate(name)
            study.start_metrics(name)
        study.wait_for_round(UNDISTURBED, 200)
        yield study
    finally:
        study.close()
        if small_disk.returncode == 0:
            subprocess.run(["umount", "-l", str(study.state)], check=False)


@pytest.fixture(scope="module")
def prometheus(study: Study) -> Iterator[Prometheus]:
    """The coordinator's and the hospitals' in one; in a real study each has its own."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus (Debian's package) is not installed")
    jobs = {"fedseg-coordinator": [study.metrics_port], "fedseg-site": [*study.site_metrics_ports.values()]}
    rules = ["rules.yml", "site_rules.yml"]
    prometheus = Prometheus(study.folder / "prometheus", jobs, rules, every="2s", lasting="5s")
    try:
        yield prometheus
    finally:
        prometheus.close()


@pytest.fixture
def before(study: Study) -> int:
    """The last round before a test, once all three sites take part, at once or one after the other."""

    start = study.rounds()

    def everybody() -> bool:
        last = study.rounds()
        return any(all(study.accepted(name, since) for name in study.names) for since in (last - 1, start))

    study.wait_for(everybody, PATIENCE, "all sites take part")
    return study.rounds()


def goes_on(study: Study, before: int, site: str | None = None) -> None:
    """Training goes on, and a site takes part in it; `pytest -rP` shows how long both took (docs/faults.md)."""
    begun = time.monotonic()
    study.wait_for_round(before + 1, PATIENCE)
    print(f"the next round was finished after {time.monotonic() - begun:.1f} s")
    study.wait_for_round(before + 2, PATIENCE)
    if site is not None:
        study.wait_for(lambda: study.accepted(site, before), PATIENCE, f"{site} takes part again")
        print(f"{site} took part again after {time.monotonic() - begun:.1f} s")


def entries(study: Study, site: str) -> list[dict[str, Any]]:
    """A site's audit log."""
    lines = (study.site(site) / "state" / "audit.jsonl").read_text().splitlines()
    return [json.loads(line)["entry"] for line in lines]


# ------------------------------------------------------------------------------------------------ undisturbed
def test_the_rounds_are_those_of_a_plain_loop_to_the_last_bit(study: Study, tmp_path: Path) -> None:
    sites = tuple(load_site(study.site(name) / "site.toml") for name in study.names)
    experiment = load_experiment(study.coordinator / "experiment.toml")

    def until_enough(event: Event) -> None:
        if event.kind == "finished-round" and event.server_round == UNDISTURBED:
            raise StopIteration

    with closing(RunStore(tmp_path)) as store, contextlib.suppress(StopIteration):
        fleet = InProcessFleet(study.names, OpenSites(sites)())
        run_federation(experiment, fleet, store, lambda: start_state(experiment), observe=until_enough)
    for query in (
        f"SELECT server_round, weights_sha256 FROM rounds WHERE server_round <= {UNDISTURBED} ORDER BY server_round",
        f"SELECT * FROM metrics WHERE server_round < {UNDISTURBED} ORDER BY server_round, site, name",
    ):
        assert len(study.rows(query)) > UNDISTURBED
        assert study.rows(query) == rows(tmp_path, query)


def test_site_services_have_no_network_and_gates_no_data(study: Study) -> None:
    for name in study.names:
        if entries(study, name)[0]["network"]:
            pytest.skip("this system grants no network namespace of one's own")
        assert devices(study.pid(f"{name}-service")) == {"lo"}
    for pid in study.family("Aare-gate"):
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "libtorch" not in maps
        assert "nibabel" not in maps


def test_every_round_is_in_the_audit_log_with_what_left(study: Study, before: int) -> None:
    study.fedseg("site", "audit", "verify", study.site("Aare") / "site.toml")
    requests = [entry for entry in entries(study, "Aare") if entry["event"] == "request"]
    assert {entry["asked"]["server_round"] for entry in requests} >= set(range(1, before + 1))
    digests = {entry["manifest"] for entry in requests if entry["decided"] == "allowed"}
    assert digests == {
        row["manifest"]
        for row in study.rows("SELECT manifest FROM updates WHERE site = 'Aare' AND status = 'accepted'")
    }


# ------------------------------------------------------------------------------------------------ the fence
def test_from_outside_a_site_reaches_the_fleet_api_with_its_own_key_and_nothing_else(
    study: Study, before: int, tmp_path: Path
) -> None:
    aare, elbe = (Credentials(study.site(n) / "site.crt", study.site(n) / "site.key") for n in ("Aare", "Elbe"))
    outsider = Outsider(study.port, study.site("Aare") / "ca.crt", tmp_path)
    node = next(int(n) for n, m in json.loads((study.state / "sites.json").read_text()).items() if m["name"] == "Aare")
    assert outsider.ask(HEARTBEAT, aare, aare.headers(), heartbeat(node)) == 200
    for path in (
        "/v1/control/list-runs",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/get-run/../../control/list-runs",
        "//v1/control/list-runs",
        "/docs",
        "/",
    ):
        assert outsider.ask(path, aare, aare.headers(), heartbeat(node)) in (403, 400, CLOSED), path
    assert outsider.ask(HEARTBEAT, aare, aare.headers(), method="GET") == 403
    assert outsider.ask(HEARTBEAT, None, aare.headers(), heartbeat(node)) == CLOSED, "without a certificate"
    assert outsider.ask(HEARTBEAT, aare, aare.headers(), heartbeat(node), tls=ssl.TLSVersion.TLSv1_2) == CLOSED, (
        "TLS 1.2"
    )
    assert outsider.ask(HEARTBEAT, None, aare.headers(), heartbeat(node), tls=None) == CLOSED, "plain HTTP"
    captured = aare.headers()
    assert outsider.ask(HEARTBEAT, elbe, captured, heartbeat(node)) == 403, "replayed by another site"
    assert (
        outsider.ask(HEARTBEAT, aare, aare.headers(datetime.now(UTC) - timedelta(minutes=10)), heartbeat(node)) == 401
    )
    assert outsider.ask(HEARTBEAT, elbe, elbe.headers(), heartbeat(node)) == 401, "in another site's name"
    assert outsider.ask(HEARTBEAT, aare, aare.headers(), b"x" * 13_000_000) in (413, CLOSED), "too large"
    unknown = outsider.with_certificate(study.kits / "authority", "Aare", 30)
    assert outsider.ask(HEARTBEAT, unknown, unknown.headers(), heartbeat(node)) == 403, "a key that is not registered"
    assert outsider.ask(HEARTBEAT, unknown, aare.headers(), heartbeat(node)) == 403, "another key's signature"
    expired = outsider.with_certificate(study.kits / "authority", "Aare", -1)
    assert outsider.ask(HEARTBEAT, expired, expired.headers(), heartbeat(node)) == CLOSED, "expired"
    stranger = outsider.with_certificate(None, "Aare", 30)
    assert outsider.ask(HEARTBEAT, stranger, stranger.headers(), heartbeat(node)) == CLOSED, "another authority"
    everything_went_on = study.rounds()
    study.wait_for_round(everything_went_on + 1, PATIENCE)
    assert not [
        row for row in study.rows("SELECT * FROM updates WHERE status != 'accepted'") if row["server_round"] > before
    ]


def test_the_superlink_listens_on_the_loopback_device_only(study: Study) -> None:
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, port = local.split(":")
            if state == "0A" and int(port, 16) == study.superlink_port:
                addresses.add(address)
    assert addresses == {"0100007F"}


# ------------------------------------------------------------------------------------------------ code approval
def test_a_changed_bundle_is_refused_before_a_line_of_it_runs(study: Study, before: int, tmp_path: Path) -> None:
    kit, marker = load_kit(study.coordinator), tmp_path / "it-ran"
    changed = _changed_bundle(tmp_path / "app", f"open({str(marker)!r}, 'w')\n")
    control = Control(kit, study.superlink_port)
    try:
        settings = {"experiment": str(kit.experiment.absolute()), "run-directory": str(tmp_path / "other")}
        control.submit(changed, settings | {"sites": str(study.state / "sites.json"), "wait-seconds": 30.0})
        query = "SELECT DISTINCT kind, site, detail FROM events WHERE kind = 'failed' ORDER BY site"
        study.wait_for(lambda: len(rows(tmp_path / "other", query)) == 3, PATIENCE, "all sites have refused")
        assert {row["detail"] for row in rows(tmp_path / "other", query)} == {"InvalidFab"}
    finally:
        for run in control.runs():
            if run.run_id != json.loads((study.state / "status.json").read_text())["run_id"]:
                control.stop(run.run_id)
        control.close()
    assert not marker.exists()
    assert "refused app bundle" in study.log("Aare-gate")
    goes_on(study, before)


# ------------------------------------------------------------------------------------------------ faults at a site
def test_alerts_fire_while_a_site_is_cut_off_for_a_minute_and_clear_when_it_takes_part_again(
    study: Study, before: int, prometheus: Prometheus
) -> None:
    study.wait_for(lambda: prometheus.scrapes(1 + len(study.names)), 30, "Prometheus finds everybody")
    silent, down = ("FedsegSiteSilent", "Elbe"), ("FedsegSiteServiceDown", "")
    assert not {silent, down} & prometheus.firing()
    study.signal("Elbe-gate", signal.SIGSTOP)
    begun = time.monotonic()
    study.kill("Elbe-service", family=True)
    study.wait_for(lambda: silent in prometheus.firing(), PATIENCE, "the alert fires")
    study.wait_for(lambda: down in prometheus.firing(), PATIENCE, "so does the hospital's own")
    study.start_service("Elbe")
    time.sleep(max(0.0, begun + 62 - time.monotonic()))
    assert study.rounds() >= before + 2, "the others went on"
    study.signal("Elbe-gate", signal.SIGCONT)
    goes_on(study, study.rounds(), "Elbe")
    study.wait_for(lambda: silent not in prometheus.firing(), 30, "it clears")
    study.wait_for(lambda: down not in prometheus.firing(), 30, "so does the hospital's")


def test_a_site_service_killed_in_training_is_asked_again_when_it_is_back(study: Study, before: int) -> None:
    study.kill("Elbe-service")
    study.start_service("Elbe")
    goes_on(study, before, "Elbe")


def test_a_gate_that_was_killed_is_asked_again_when_it_is_back(study: Study, before: int) -> None:
    study.kill("Elbe-gate", family=True)
    study.start_gate("Elbe")
    goes_on(study, before, "Elbe")


def test_a_site_that_sends_nonsense_changes_nothing(study: Study) -> None:
    socket = tomllib.loads((study.site("Loire") / "site.toml").read_text())["socket"]
    program = [str(PYTHON), str(ROOT / "tests/integration/rogue.py"), socket, "Loire"]
    study.stop("Loire-service")
    try:
        for misbehaviour, answer in NONSENSE.items():
            before = study.rounds()
            study.start_program("rogue", [*program, misbehaviour])
            try:
                study.wait_for(lambda: answer in study.answers("Loire", before), PATIENCE, f"Loire {answer}")  # noqa: B023
                goes_on(study, study.rounds(), "Aare")
            finally:
                study.stop("rogue")
    finally:
        study.start_service("Loire")


def test_a_corrupt_volume_is_set_aside_and_counted_and_the_change_is_noticed(
    study: Study, before: int, prometheus: Prometheus
) -> None:
    image = sorted((study.data("Loire") / "imagesTr").iterdir())[0]
    whole = image.read_bytes()
    image.write_bytes(whole[:-100])
    try:
        query = "SELECT quarantined FROM updates WHERE site = 'Loire' AND server_round > ? AND quarantined != '{}'"
        study.wait_for(lambda: study.rows(query, before), PATIENCE, "the volume is counted")
        assert json.loads(study.rows(query, before)[0]["quarantined"]) == {"unreadable": 1}
        changed = "SELECT server_round FROM events WHERE kind = 'data-changed' AND site = 'Loire' AND server_round > ?"
        assert study.rows(changed, before)
        assert image.name not in study.server_log()
        series = "fedseg_site_quarantined_cases"  # for as long as there are such cases
        study.wait_for(lambda: prometheus.ever(series), PATIENCE, "Prometheus has seen it")
    finally:
        image.write_bytes(whole)
    goes_on(study, study.rounds(), "Loire")


def test_a_second_machine_with_the_same_key_stays_outside(study: Study, before: int) -> None:
    study.start("twin", "site", "gate", study.site("Aare"), "--home", study.folder / "twin")
    try:
        study.wait_for(lambda: "another process is connected with it" in study.log("twin"), PATIENCE, "it is told why")
        goes_on(study, before, "Aare")
    finally:
        study.stop("twin")


def test_a_gate_whose_clock_is_two_hours_fast_is_told_so(study: Study, before: int) -> None:
    program = [str(PYTHON), str(ROOT / "tests/integration/late_clock.py"), str(study.site("Aare")), "/nowhere.sock"]
    study.start_program("clock", [*program, str(study.folder / "clock")])
    try:
        study.wait_for(lambda: "is this machine's clock right" in study.log("clock"), PATIENCE, "it is told why")
        goes_on(study, before, "Aare")
    finally:
        study.stop("clock")


def test_a_straggler_is_late_and_takes_part_again(study: Study, before: int) -> None:
    study.signal("Elbe-service", signal.SIGSTOP)
    study.wait_for(lambda: ("late", "deadline") in study.answers("Elbe", before), PATIENCE, "Elbe is late")
    study.signal("Elbe-service", signal.SIGCONT)
    goes_on(study, study.rounds(), "Elbe")


# ------------------------------------------------------------------------------------------------ faults at the coordinator
def test_a_serverapp_that_was_killed_is_started_again(study: Study, before: int) -> None:
    study.kill_part("server", "flwr-serverapp")
    goes_on(study, before, "Aare")
    assert study.rows("SELECT 1 FROM events WHERE kind = 'resumed' AND server_round >= ?", before)


def test_a_superlink_that_was_killed_is_started_again(study: Study, before: int) -> None:
    study.kill_part("server", "flower-superlink")
    goes_on(study, before, "Aare")
    assert "the SuperLink has ended" in study.log("server")


def test_a_coordinator_that_was_killed_goes_on_when_it_is_started_again(study: Study, before: int) -> None:
    study.kill("server")
    study.start_server()
    goes_on(study, before, "Aare")


def test_a_full_disk_stops_the_rounds_until_there_is_room(study: Study, before: int) -> None:
    if not study.state.is_mount():
        pytest.skip("this system lets nobody mount a small disk")
    filler = study.state / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(1 << 16))
    study.wait_for(
        lambda: "the run has ended" in study.log("server").rpartition("goes on after round")[2],
        PATIENCE,
        "it is noticed",
    )
    stuck = study.rounds()
    filler.unlink()
    goes_on(study, stuck, "Aare")


def test_a_study_can_be_stopped_and_resumed(study: Study, before: int) -> None:
    assert "stopped after round" in study.fedseg("server", "stop", study.coordinator, "--state", study.state)
    study.wait_for(lambda: study.ended("server") == 0, 20, "the server has ended")
    with pytest.raises(AssertionError, match="`fedseg server resume` goes on"):
        study.fedseg("server", "start", study.coordinator, "--state", study.state)
    study.start_server("resume")
    goes_on(study, before, "Aare")


def test_every_panel_and_every_rule_has_data_of_this_study(study: Study, before: int, prometheus: Prometheus) -> None:
    panels = [*panel_queries("study.json", run="federated"), *panel_queries("site.json", site="Aare")]
    empty = [(title, query) for title, query in panels if not prometheus.ever(query)]
    gpu = [panel for panel in empty if "_gpu_" in panel[1]]
    assert len(panels) > 30
    assert [panel for panel in empty if panel not in gpu] == []
    for rules in ("rules.yml", "site_rules.yml"):
        for rule, metrics in rule_metrics(rules).items():
            for metric in metrics:
                assert "_gpu_" in metric or prometheus.ever(metric), f"{rule}: {metric}"


def test_a_revoked_site_is_shut_out_while_the_others_go_on(study: Study, before: int) -> None:
    study.fedseg("provision", study.folder / "study.toml", "-o", study.kits, "--revoke", "Loire")
    study.wait_for(lambda: "is shut out" in study.log("server"), PATIENCE, "the key is shut out")
    study.wait_for(lambda: "reads its configuration anew" in study.log("server"), PATIENCE, "so does the fence")
    now = study.rounds()
    goes_on(study, now, "Aare")
    assert not study.accepted("Loire", now + 1)
    overview = json.loads(study.fedseg("server", "status", study.coordinator, "--state", study.state, "--json"))
    assert [site["name"] for site in overview["sites"]] == ["Aare", "Elbe"]
    assert overview["rounds"] >= now


def _changed_bundle(folder: Path, line: str) -> bytes:
    """The bundle of this installation with one more line in the ClientApp."""
    for name in ("server", "client", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copy(source, folder / name)
    program = folder / "client" / "app.py"
    program.write_text(program.read_text() + line)
    return bytes(build_fab_from_disk(folder))
