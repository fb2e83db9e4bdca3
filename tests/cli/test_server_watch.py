import pytest
from typer.testing import CliRunner

from fedseg.cli import app
from tests.federated.toys import run_toy, toy_experiment


@pytest.fixture
def watch():
    return lambda *words: CliRunner().invoke(app, ["server", "watch", *map(str, words)], env={"COLUMNS": "120"})


def test_a_run_is_shown_in_a_terminal(watch, tmp_path):
    run_toy(toy_experiment(rounds=2), tmp_path)
    shown = watch(tmp_path, "--once")
    assert shown.exit_code == 0, shown.output
    assert "toy (federated): finished, round 2 of 2" in shown.output
    for site in "ABC":
        assert any(site in line and "accepted" in line for line in shown.output.splitlines())


def test_a_kit_stands_for_the_state_folder_in_it(watch, tmp_path):
    (tmp_path / "kit.toml").touch()
    run_toy(toy_experiment(rounds=2), tmp_path / "state" / "run")
    (tmp_path / "state" / "status.json").write_text('{"study": "Liver", "restarts": {}, "problem": ""}')
    assert "Liver (federated): finished" in watch(tmp_path, "--once").output


def test_a_folder_that_is_not_there_is_named(watch, tmp_path):
    shown = watch(tmp_path / "nowhere", "--once")
    assert shown.exit_code != 0
    assert "nowhere: no such folder" in shown.output + str(shown.exception)
