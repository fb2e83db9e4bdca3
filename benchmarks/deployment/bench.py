"""Seconds per round beyond training: our deployment against plain Flower that trains inside its ClientApp.

    python benchmarks/deployment/bench.py [ROUNDS]

Both run the light MLRU++ at three sites with the same phantoms, rounds, seed and server code, one after the other on this
machine, first one way
and then the other. Ours has TLS 1.3, client certificates, signed requests, policy, audit log and data manifest on top; plain
Flower has none of it.

The overhead of a round is its duration minus the seconds for which the slowest site trained.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.plain_flower import Deployment  # noqa: E402
from fedseg.config import Experiment, parse_experiment  # noqa: E402
from tests.integration.study import Study, rows  # noqa: E402

FIRST = 2
"""Round 1 opens files and builds networks in both ways; it is not counted."""


def experiment(rounds: int) -> Experiment:
    """The light MLRU++, four steps per round."""
    return parse_experiment(
        json.dumps(
            {
                "name": "overhead",
                "task": {
                    "name": "phantom",
                    "modality": "mr",
                    "labels": {"background": 0, "liver": 1, "spleen": 2, "kidneys": 3},
                },
                "data": {"validation_fraction": 0.34},
                "model": {"name": "mlru++", "preset": "light"},
                "training": {"patch_size": [32, 32, 32], "steps_per_epoch": 4},
                "federation": {"rounds": rounds, "min_sites": 3, "evaluate_every": rounds},
            }
        )
    )


def ours(folder: Path, rounds: int) -> list[float]:
    """Overhead per round of the whole deployment."""
    study = Study(folder, experiment(rounds))
    try:
        study.start_server()
        for name in study.names:
            study.start_service(name)
            study.start_gate(name)
        study.wait_for(lambda: study.rounds() >= rounds, 900, "the study is finished")
        return overheads(study.run)
    finally:
        study.close()


def plain(folder: Path, rounds: int) -> list[float]:
    """Overhead per round of plain Flower."""
    app = folder / "app"
    shutil.copytree(ROOT / "server", app / "server")
    shutil.copytree(ROOT / "benchmarks" / "deployment" / "plain" / "client", app / "client")
    shutil.copy(ROOT / "pyproject.toml", app / "pyproject.toml")
    data = Study(folder / "study", experiment(rounds))
    deployment = Deployment(folder)
    try:
        deployment.start_superlink()
        for name in data.names:
            deployment.start_supernode(name, data.site(name) / "site.toml")
        deployment.start_run(
            {
                "experiment": str(folder / "study" / "experiment.toml"),
                "run-directory": str(folder / "run"),
                "wait-for-sites": 3,
            },
            app,
        )
        deployment.wait_until(lambda: deployment.finished("run"), 900, "the run is over")
        return overheads(folder / "run")
    finally:
        deployment.close()


def overheads(run: Path) -> list[float]:
    """Seconds of each counted round beyond its slowest training."""
    found = []
    for row in rows(run, "SELECT server_round, seconds FROM rounds WHERE server_round >= ?", FIRST):
        updates = rows(run, "SELECT training FROM updates WHERE server_round = ?", row["server_round"])
        found.append(row["seconds"] - max(json.loads(update["training"])["seconds"] for update in updates))
    return found


def main() -> None:
    """Run both ways and compare."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    results: dict[str, list[float]] = {}
    for way, measure in (("plain Flower", plain), ("fedseg", ours)):
        with tempfile.TemporaryDirectory(prefix="b") as folder:
            results[way] = measure(Path(folder), rounds)
    print(
        f"{'way':14}{'median s':>9}{'least':>8}{'most':>8}   seconds per round beyond training, rounds {FIRST}..{rounds}"
    )
    for way, seconds in results.items():
        print(f"{way:14}{median(seconds):9.2f}{min(seconds):8.2f}{max(seconds):8.2f}")
    print(f"plain Flower / fedseg: {median(results['plain Flower']) / median(results['fedseg']):.1f}")


if __name__ == "__main__":
    main()
