"""The same run for real: a SuperLink and three SuperNodes as processes, one site broken, one leaving on the way."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedseg.config import Experiment
from fedseg.federated.driver import run_federation
from fedseg.federated.local import InProcessFleet
from fedseg.federated.messages import Answer, RoundInstructions, SiteFailure
from fedseg.federated.site import OpenSites, start_state
from fedseg.federated.store import RunStore
from fedseg.site.config import load_site
from tests.apps.hospitals import tiny_experiment, write_experiment, write_hospitals
from tests.integration.deployment import Deployment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(280)]

BROKEN, LEAVING = "Loire", "Elbe"
PATIENT = "Mustermann_Max"
ROUNDS_TOGETHER = 2


@dataclass(frozen=True)
class Finished:
    """A run that has ended, and the same run without Flower."""

    deployment: Deployment
    output: Path
    loop: Path

    def story(self) -> str:
        """What happened, for whoever has to find out why a test failed."""
        events = _rows(self.output, "SELECT server_round, site, kind, detail FROM events ORDER BY id")
        return "\n".join([*map(str, events), *(self.deployment.log(name)[-3000:] for name in ("run", "Aare"))])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("deployment")
    experiment = tiny_experiment(rounds=ROUNDS_TOGETHER + 1, min_sites=1)
    files = write_hospitals(folder / "hospitals")
    _break(files[BROKEN].parent / "data")
    _run_as_loop(experiment, files, folder / "loop")
    write_experiment(folder / "experiment.toml", experiment)
    deployment, output = Deployment(folder), folder / "output"
    try:
        deployment.start_superlink()
        for name, path in files.items():
            deployment.start_supernode(name, path)
        deployment.start_run(
            {"experiment": f"{folder}/experiment.toml", "run-directory": str(output), "wait-for-sites": len(files)}
        )
        deployment.wait_until(lambda: _rounds(output) > ROUNDS_TOGETHER, 200, f"round {ROUNDS_TOGETHER} is over")
        deployment.stop(LEAVING)
        deployment.wait_until(lambda: deployment.finished("run"), 100, "the run is over")
        yield Finished(deployment, output, folder / "loop")
    finally:
        deployment.close()


def test_every_round_gives_the_weights_of_a_plain_loop_to_the_last_bit(finished: Finished) -> None:
    query = "SELECT server_round, weights_sha256 FROM rounds ORDER BY server_round"
    rounds = _rows(finished.output, query)
    assert len(rounds) == ROUNDS_TOGETHER + 2
    assert rounds == _rows(finished.loop, query), finished.story()


def test_every_score_is_that_of_a_plain_loop(finished: Finished) -> None:
    query = "SELECT server_round, site, name, value FROM metrics ORDER BY server_round, site, name"
    scores = _rows(finished.output, query)
    assert {row["site"] for row in scores} == {"Aare", LEAVING}, finished.story()
    assert scores == _rows(finished.loop, query), finished.story()


def test_the_broken_site_is_known_by_its_errors_class_and_its_files_stay_at_home(finished: Finished) -> None:
    query = f"SELECT DISTINCT status, reason FROM updates WHERE site = '{BROKEN}'"
    assert _rows(finished.output, query) == _rows(finished.loop, query)
    assert PATIENT in finished.deployment.log(BROKEN)
    on_the_server = finished.deployment.log("superlink") + finished.deployment.log("run")
    assert f"{BROKEN} abstained" in on_the_server
    kept = b"".join(path.read_bytes() for path in finished.output.glob("store.sqlite*"))
    for secret in (PATIENT, "imagesTr"):
        assert secret not in on_the_server
        assert secret.encode() not in kept


def test_the_run_goes_on_without_a_node_that_leaves(finished: Finished) -> None:
    query = "SELECT site, status FROM updates WHERE server_round = {} ORDER BY site"
    before = {row["site"]: row["status"] for row in _rows(finished.output, query.format(ROUNDS_TOGETHER))}
    after = {row["site"]: row["status"] for row in _rows(finished.output, query.format(ROUNDS_TOGETHER + 1))}
    assert before == {"Aare": "accepted", LEAVING: "accepted", BROKEN: "abstained"}
    assert after["Aare"] == "accepted"
    assert after.get(LEAVING, "failed") == "failed"


def _break(data: Path) -> None:
    """Cut off the files of all cases, and name them after a patient."""
    listing = data / "dataset.json"
    document = json.loads(listing.read_text())
    for number, case in enumerate(document["training"]):
        old = data / case["image"]
        new = old.with_name(f"{PATIENT}_{number}.nii.gz")
        new.write_bytes(old.read_bytes()[:50])
        label = data / case["label"]
        label.rename(label.with_name(new.name))
        old.unlink()
        case["image"] = str(new.relative_to(data))
        case["label"] = str(label.with_name(new.name).relative_to(data))
    listing.write_text(json.dumps(document))


def _run_as_loop(experiment: Experiment, files: dict[str, Path], output: Path) -> None:
    ask_site = OpenSites(tuple(load_site(path) for path in files.values()))()

    def ask(site: str, instructions: RoundInstructions) -> Answer:
        if site == LEAVING and instructions.server_round > ROUNDS_TOGETHER:
            return SiteFailure(site, instructions.server_round, "failed", "left")
        return ask_site(site, instructions)

    with closing(RunStore(output)) as store:
        run_federation(experiment, InProcessFleet(list(files), ask), store, lambda: start_state(experiment))


def _rounds(output: Path) -> int:
    if not (output / "store.sqlite").exists():
        return 0
    try:
        return len(_rows(output, "SELECT 1 FROM rounds"))
    except sqlite3.OperationalError:  # the server is just making its tables
        return 0


def _rows(output: Path, query: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(f"file:{output / 'store.sqlite'}?mode=ro", uri=True)) as database:
        cursor = database.execute(query)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]
