"""The two programs: what the gate pulls in, what the bundle ships, and a whole run of the ServerApp."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

import server.app
from fedseg import flower
from fedseg.config import load_experiment
from fedseg.errors import StoreError
from fedseg.federated.store import RunStore
from fedseg.federated.weights import digest
from fedseg.model_file import load_model_file
from fedseg.site.config import load_site
from tests.apps.grid import LoopGrid
from tests.apps.hospitals import gates, run_as_loop, tiny_experiment, write_experiment, write_hospitals

ROOT = Path(__file__).parents[2]


def test_the_gate_loads_neither_torch_nor_anything_that_reads_volumes() -> None:
    program = "import sys, client.app; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert loaded & {"torch", "monai", "nibabel", "scipy", "matplotlib", "ray"} == set()
    assert "fedseg.data.volume" not in result.stdout.split()


def test_the_bundle_ships_the_two_programs_and_the_experiments_only() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    shipped = {path for pattern in settings["fab-include"] for path in ROOT.glob(pattern)}
    assert {path.relative_to(ROOT).parts[0] for path in shipped} == {"server", "client"}
    assert ROOT / settings["config"]["experiment"] in shipped


@pytest.mark.parametrize("path", sorted((ROOT / "server" / "experiments").glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_experiment_is_valid(path: Path) -> None:
    assert load_experiment(path).name == path.stem


def test_telemetry_is_off_once_flower_is_imported_through_us() -> None:
    program = "import fedseg.flower, flwr.supercore.telemetry as t; print(t.FLWR_TELEMETRY_ENABLED)"
    environment = {key: value for key, value in os.environ.items() if key != "FLWR_TELEMETRY_ENABLED"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "0"


def test_the_server_runs_an_experiment_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "POLL", (0.001, 0.01))
    files, experiment = write_hospitals(tmp_path), tiny_experiment()
    expected = run_as_loop(experiment, files, tmp_path / "loop")
    write_experiment(tmp_path / "tiny.toml", experiment)
    settings = {
        "experiment": str(tmp_path / "tiny.toml"),
        "run-directory": str(tmp_path / "run"),
        "resume": False,
        "wait-for-sites": 3,
        "wait-seconds": 60.0,
        "sites": "",
    }
    with gates(map(load_site, files.values())) as nodes:
        grid = LoopGrid(nodes)
        server.app.app(grid, Context(1, 0, {}, RecordDict(), settings))
        store = RunStore(tmp_path / "run")
        row = store.rows("SELECT weights_sha256 FROM rounds WHERE server_round = 2")[0]
        assert row["weights_sha256"] == digest(expected.weights)
        assert load_model_file(tmp_path / "run")[0] == experiment
        with pytest.raises(StoreError, match="holds run 'federated' already"):
            server.app.app(grid, Context(1, 0, {}, RecordDict(), settings))
        server.app.app(grid, Context(1, 0, {}, RecordDict(), settings | {"resume": True}))
        assert store.rows("SELECT resumed FROM runs")[0]["resumed"] == 1
