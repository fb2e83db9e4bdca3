import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fedseg.cli import app
from fedseg.coordinator.writers.copy import copy_run
from fedseg.coordinator.writers.writer import make_writer
from fedseg.errors import ConfigError, StoreError
from fedseg.federated.messages import SiteFailure
from tests.federated.toys import changed_fleet, rows, run_toy, toy_experiment

PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow"}


@pytest.fixture(params=sorted(PACKAGES))
def kind(request):
    pytest.importorskip(PACKAGES[request.param], reason=f"pip install 'fedseg[{request.param}]'")
    return request.param


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three rounds; a site abstains in the second."""
    directory = tmp_path_factory.mktemp("run")
    run_toy(toy_experiment(rounds=3, min_sites=2), directory, fleet=changed_fleet(_abstaining))
    return directory


def _abstaining(site, instructions, answer):
    if (site, instructions.server_round) == ("C", 2):
        return SiteFailure("C", 2, "abstained", "too-few-cases")
    return answer


def export(directory, kind, output, *more):
    done = CliRunner().invoke(app, ["server", "export", str(directory), "--as", kind, "-o", str(output), *more])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def read(kind, output):
    """All values that a program shows: {(name, round): [(value, time), ...]}, texts by name, parameters, and state."""
    return {"tensorboard": _read_tensorboard, "mlflow": _read_mlflow}[kind](output)


def _read_tensorboard(output):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    (folder,) = output.glob("toy/federated-*")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    values, texts, parameters = {}, {}, {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            values.setdefault((name, event.step), []).append((event.value, event.wall_time))
    for name in events.Tags()["tensors"]:
        if name.endswith("/text_summary"):
            for event in events.Tensors(name):
                texts[name.removesuffix("/text_summary"), event.step] = event.tensor_proto.string_val[0].decode()
    data = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    for name, value in HParamsPluginData.FromString(data).session_start_info.hparams.items():
        parameters[name] = getattr(value, value.WhichOneof("kind"))
    return values, texts, parameters, texts.get(("state", 0))


def _read_mlflow(output):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{output / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("toy").experiment_id])
    values = {}
    for name in found.data.metrics:
        for metric in client.get_metric_history(found.info.run_id, name):
            values.setdefault((name, metric.step), []).append((metric.value, metric.timestamp / 1000))
    texts = {
        ("failures", int(name.split("/")[1])): text for name, text in found.data.tags.items() if "failures/" in name
    }
    state = {"FINISHED": "finished"}.get(found.info.status)
    return values, texts, found.data.params, state


def test_what_the_store_knows_is_what_the_program_shows(run, kind, tmp_path):
    export(run, kind, tmp_path / "out")
    values, texts, parameters, state = read(kind, tmp_path / "out")
    for row in rows(run, "SELECT * FROM metrics WHERE server_round = 3"):
        (shown,) = values[f"score/{row['name']}/{row['site']}", 3]
        assert shown[0] == pytest.approx(row["value"])
    committed = {row["server_round"]: row["finished"] for row in rows(run, "SELECT * FROM rounds")}
    for (_, number), shown in values.items():
        assert [time for _, time in shown] == [pytest.approx(committed[number], abs=0.001)]
    dice = [row["value"] for row in rows(run, "SELECT value FROM metrics WHERE name = 'dice' AND server_round = 2")]
    assert values["dice/worst", 2][0][0] == pytest.approx(min(dice))
    assert values["dice/mean", 2][0][0] == pytest.approx(sum(dice) / 3)
    assert [values["round/sites-accepted", number][0][0] for number in (1, 2, 3)] == [3, 2, 3]
    assert {("norm/A", 1), ("loss/A", 1), ("loss/mean", 3), ("round/seconds", 2), ("round/megabytes", 2)} <= set(values)
    assert ("norm/C", 2) not in values
    assert texts["failures", 2] == "C: abstained (too-few-cases)"
    assert float(parameters["federation.rounds"]) == 3
    assert parameters["model.name"] == "unet"
    assert state == "finished"


def test_an_export_that_is_repeated_adds_nothing(run, kind, tmp_path):
    export(run, kind, tmp_path / "out")
    before = read(kind, tmp_path / "out")
    assert ": 0 new values" in export(run, kind, tmp_path / "out")
    assert read(kind, tmp_path / "out") == before


def test_following_a_run_that_is_resumed_writes_every_value_once(run, kind, tmp_path):
    """The run goes on between two looks at it; the writing process ends and is started again in the middle."""
    experiment, directory = toy_experiment(rounds=3, min_sites=2), tmp_path / "live"

    class Enough(Exception):
        pass

    def ended_after(number):
        def answer(site, instructions, given):
            if instructions.server_round > number:
                raise Enough
            return _abstaining(site, instructions, given)

        return changed_fleet(answer)

    def one_more_round(upto):
        def pause(seconds):
            try:
                run_toy(experiment, directory, fleet=ended_after(next(upto)), resume=directory.exists())
            except Enough:
                pass
            except StopIteration:
                raise KeyboardInterrupt from None

        return pause

    with pytest.raises(KeyboardInterrupt):
        copy_run(directory, "federated", make_writer(kind, str(tmp_path / "out")), follow=True,
                 pause=one_more_round(iter([1])))  # fmt: skip
    assert {number for _, number in read(kind, tmp_path / "out")[0]} == {1}
    assert read(kind, tmp_path / "out")[3] is None
    copy_run(directory, "federated", make_writer(kind, str(tmp_path / "out")), follow=True,
             pause=one_more_round(iter([2, 9])))  # fmt: skip
    values, _, _, state = read(kind, tmp_path / "out")
    assert all(len(shown) == 1 for shown in values.values())
    export(run, kind, tmp_path / "whole")
    assert set(values) == set(read(kind, tmp_path / "whole")[0])
    assert state == "finished"


def test_values_of_a_process_that_was_killed_while_it_wrote_are_written_again(run, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install 'fedseg[tensorboard]'")
    export(run, "tensorboard", tmp_path / "out")
    whole = read("tensorboard", tmp_path / "out")
    (events,) = tmp_path.glob("out/toy/*/events.*")
    events.write_bytes(events.read_bytes()[: -events.stat().st_size // 3])
    assert ": 0 new" not in export(run, "tensorboard", tmp_path / "out")
    assert read("tensorboard", tmp_path / "out") == whole


def test_two_runs_in_one_place_stay_apart(run, kind, tmp_path):
    run_toy(toy_experiment(rounds=1), tmp_path / "other")
    export(run, kind, tmp_path / "out")
    assert ": 0 new" not in export(tmp_path / "other", kind, tmp_path / "out")


def test_nothing_is_asked_of_the_internet(run, kind, tmp_path):
    program = (
        "import sys\n"
        "def watch(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'):\n"
        "        print('ASKED', event, arguments, flush=True)\n"
        "sys.addaudithook(watch)\n"
        "from fedseg.cli import app\n"
        f"app(['server', 'export', {str(run)!r}, '--as', {kind!r}, '-o', {str(tmp_path / 'out')!r}])\n"
    )
    telling = re.compile("^(CI|.*_CI|PYTEST.*|MLFLOW.*|DO_NOT_TRACK|.*CODEX.*)$")  # with these MLflow is silent anyway
    environment = {name: value for name, value in os.environ.items() if not telling.match(name)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "ASKED" not in done.stdout
    assert "new values" in done.stdout


def test_a_server_that_does_not_answer_is_named(run, monkeypatch):
    pytest.importorskip("mlflow", reason="pip install 'fedseg[mlflow]'")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(StoreError, match=r"MLflow at http://127\.0\.0\.1:9: .*it goes on"):
        export(run, "mlflow", "http://127.0.0.1:9")


@pytest.mark.parametrize("kind", sorted(PACKAGES))
def test_a_package_that_is_absent_is_named_with_its_extra(run, kind, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[kind], None)
    monkeypatch.delitem(sys.modules, f"fedseg.coordinator.writers.{kind}", raising=False)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=rf"pip install 'fedseg\[{kind}\]'"):
        export(run, kind, tmp_path / "out")


def test_a_place_is_needed_and_tables_cannot_follow(run):
    for kind, more, expected in (
        ("tensorboard", (), "--output: --as tensorboard needs a folder"),
        ("csv", ("--follow",), "--follow: csv is written once"),
    ):
        done = CliRunner().invoke(app, ["server", "export", str(run), "--as", kind, *more])
        assert expected in str(done.exception)
