"""The way of a hospital without an IT department: `fedseg site start`, a study that comes to its end, a clean stop."""

import json
import shutil
from collections.abc import Iterator

import pytest

from fedseg.federated.exchange import take_weights
from fedseg.federated.weights import digest
from fedseg.model_file import load_model_file
from tests.apps.hospitals import tiny_experiment
from tests.integration.study import Study, command_of

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(280),
    pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx, which is not installed"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    study = Study(tmp_path_factory.mktemp("f"), tiny_experiment(rounds=2, min_sites=1), ("Aare",))
    try:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("FEDSEG_LOG_FORMAT", "json")
            study.start("Aare", "site", "start", study.site("Aare"))
            study.start_server()
        study.wait_for(lambda: study.ended("server") is not None, 200, "the study is finished")
        yield study
    finally:
        study.close()


def test_the_server_ends_with_a_model_of_the_last_round(finished: Study) -> None:
    assert finished.ended("server") == 0, finished.story()
    experiment, model = load_model_file(finished.run)
    assert experiment.name == "tiny"
    last = finished.rows("SELECT weights_sha256 FROM rounds ORDER BY server_round DESC LIMIT 1")[0]["weights_sha256"]
    assert digest(take_weights(model)) == last
    assert finished.rows("SELECT value FROM metrics WHERE server_round = 2 AND name = 'dice'")
    assert "the study is finished" in finished.log("server")


def test_every_program_logs_json_and_says_which_run_round_and_site_it_is_about(finished: Study) -> None:
    state = finished.site("Aare") / "state"
    files = {
        "site start": finished.folder / "Aare.log",
        "service": state / "site-service.log",
        "gate": state / "gate.log",
        "supervisor": finished.folder / "server.log",
        "run": finished.run / "server.log",
    }
    logs = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in files.items()}
    keys = {"time", "level", "logger", "message", "run", "round", "site"}
    assert all(keys <= line.keys() for lines in logs.values() for line in lines)
    assert all(logs.values())
    assert {line["site"] for name in ("site start", "service", "gate") for line in logs[name]} == {"Aare"}
    assert {line["run"] for line in logs["run"]} == {"federated"}
    answers = [(line["round"], line["site"]) for line in logs["run"] if "accepted" in line["message"]]
    assert answers == [(1, "Aare"), (2, "Aare")]
    images = [path.name.removesuffix(".nii.gz") for path in finished.data("Aare").rglob("*.nii.gz")]
    assert not any(image in files["run"].read_text() for image in images)


def test_starting_a_finished_study_again_says_so_and_ends(finished: Study) -> None:
    assert "is finished" in finished.fedseg("server", "start", finished.coordinator, "--state", finished.state)
    status = finished.fedseg("server", "status", finished.coordinator, "--state", finished.state)
    assert "finished, round 2 of 2" in status


def test_gate_and_service_end_with_the_command_that_started_them(finished: Study) -> None:
    children = finished.family("Aare")
    assert any("site serve" in command_of(pid) for pid in children)
    assert any("site gate" in command_of(pid) for pid in children)
    assert finished.stop("Aare", 60) == 0
    assert "gate and site service have ended" in finished.log("Aare")
    assert not any(f"fedseg site serve {finished.site('Aare')}" in command_of(pid) for pid in children)
    socket = next(line for line in (finished.site("Aare") / "site.toml").read_text().splitlines() if "socket" in line)
    assert not (finished.folder / socket.split('"')[1]).exists()
