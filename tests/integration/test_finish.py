"""The way of a hospital without an IT department: `fedseg site start`, a study that comes to its end, a clean stop."""

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
