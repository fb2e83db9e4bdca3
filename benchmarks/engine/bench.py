"""Seconds per round without any training: our local engine against Flower's simulation, doing the same FedAvg.

Run `python benchmarks/engine/bench.py [--sites 10] [--megabytes 10] [--rounds 6] [--repeats 3]`; needs the `ray` extra.
Sites answer at once with a constant update. Ours runs whole rounds: screening, exact mean, store, two checkpoints kept,
everything synced to disk; Flower's keeps nothing. A round is the time from one broadcast to the next; the first one, in
which processes warm up, is left out of the median and shown as start-up, together with the rest of the process's life.
Variants take turns, each in a process of its own. CPU seconds are those of all processes of a variant, found by a mark in
their environment (Linux only).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from fedseg.config import Experiment, parse_experiment
from fedseg.federated.driver import run_federation
from fedseg.federated.local import Ask, InProcessFleet, WorkerFleet
from fedseg.federated.messages import RoundInstructions, SiteUpdate
from fedseg.federated.rounds import initial_state
from fedseg.federated.store import RunStore
from fedseg.federated.weights import Weights

LAYERS = 16
VARIANTS = ("ours, in process", "ours, 2 workers", "Flower simulation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--megabytes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--output", help="folder for our store and checkpoints, to choose the disk; absent: a temporary one"
    )
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        marks = measure(arguments)
        print(json.dumps([[late - early for late, early in zip(*pair[::-1], strict=True)] for pair in pairwise(marks)]))
        return
    found: dict[str, list[tuple[float, float, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(arguments.repeats):
        for variant in VARIANTS:
            found[variant].append(in_a_process(variant))
    print(
        f"{arguments.sites} sites, {arguments.megabytes} MB, {arguments.repeats} runs of {arguments.rounds} rounds, in turns"
    )
    print(f"{'':<20} {'wall per round':>24} {'CPU per round':>24} {'start-up, end':>14}   ours / Flower: wall, CPU")
    wall, cpu = (statistics.median(column) for column in list(zip(*found[VARIANTS[-1]], strict=True))[:2])
    for variant, runs in found.items():
        walls, cpus, rests = zip(*runs, strict=True)
        ratios = f"{statistics.median(walls) / wall:.2f} {statistics.median(cpus) / cpu:.2f}"
        print(f"{variant:<20} {spread(walls):>24} {spread(cpus):>24} {statistics.median(rests):>12.1f} s   {ratios}")


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} s ({min(values):.3f}-{max(values):.3f})"


def in_a_process(variant: str) -> tuple[float, float, float]:
    """Median wall and CPU seconds per round after the first, and the other wall seconds of the process."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FEDSEG_BENCH": uuid.uuid4().hex,
    }
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--measure", variant],
        check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip
    total = time.monotonic() - begun
    walls, cpus = zip(*json.loads(done.stdout.splitlines()[-1])[1:], strict=True)
    return statistics.median(walls), statistics.fmean(cpus), total - sum(walls)


Mark = tuple[float, float]
"""Wall and CPU seconds so far."""


def mark() -> Mark:
    """Now; the CPU seconds are of this process and all that have its mark in their environment."""
    ours, ticks = f"FEDSEG_BENCH={os.environ['FEDSEG_BENCH']}".encode(), 0
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if ours in (folder / "environ").read_bytes():
                ticks += sum(map(int, (folder / "stat").read_text().rpartition(")")[2].split()[11:15]))
    return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK")


def measure(arguments: argparse.Namespace) -> list[Mark]:
    """Moments at which the rounds of one run began, and at which the last one ended."""
    if arguments.measure == VARIANTS[-1]:
        return flower(arguments.sites, arguments.megabytes, arguments.rounds)
    sites = [f"site-{number}" for number in range(arguments.sites)]
    if arguments.measure == VARIANTS[0]:
        return ours(InProcessFleet(sites, make_ask(arguments.megabytes)), arguments)
    with WorkerFleet(sites, partial(make_ask, arguments.megabytes), 2, preload=("fedseg.federated.local",)) as fleet:
        return ours(fleet, arguments)


@lru_cache(maxsize=1)
def weights(megabytes: int) -> Weights:
    generator, size = np.random.default_rng(0), megabytes * 1_000_000 // 4 // LAYERS
    return {f"layer-{number}": generator.standard_normal(size, dtype=np.float32) for number in range(LAYERS)}


@lru_cache(maxsize=1)
def constant_delta(megabytes: int) -> Weights:
    return {name: 1e-3 * array for name, array in weights(megabytes).items()}


def make_ask(megabytes: int) -> Ask:
    def ask(site: str, instructions: RoundInstructions) -> SiteUpdate:
        return SiteUpdate(site, instructions.server_round, constant_delta(megabytes) if instructions.train else {}, 7)

    return ask


def experiment(rounds: int) -> Experiment:
    document = {
        "name": "overhead",
        "task": {"name": "none", "modality": "mr", "labels": {"background": 0, "organ": 1}},
        "model": {"name": "unet"},
        "training": {"patch_size": [16, 16, 16]},
        "federation": {"rounds": rounds},
    }
    return parse_experiment(json.dumps(document))


def ours(fleet: InProcessFleet | WorkerFleet, arguments: argparse.Namespace) -> list[Mark]:
    study, marks = experiment(arguments.rounds), []
    with tempfile.TemporaryDirectory(dir=arguments.output) as folder:
        store = RunStore(Path(folder))
        run_federation(
            study,
            fleet,
            store,
            lambda: initial_state(study, weights(arguments.megabytes)),
            observe=lambda event: marks.append(mark()) if event.kind in ("round", "finished") else None,
        )
        store.close()
    return marks


def flower(sites: int, megabytes: int, rounds: int) -> list[Mark]:
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    marks: list[Mark] = []

    class Timed(FedAvg):
        def configure_train(self, *args, **kwargs):
            marks.append(mark())
            return super().configure_train(*args, **kwargs)

    server, client = ServerApp(), ClientApp()

    @server.main()
    def serve(grid: Grid, _: Context) -> None:
        strategy = Timed(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
        strategy.start(grid, ArrayRecord(list(weights(megabytes).values())), num_rounds=rounds)
        marks.append(mark())

    @client.train()
    def train(message: Message, _: Context) -> Message:
        delta = constant_delta(megabytes).values()
        received = message.content["arrays"].to_numpy_ndarrays()
        arrays = ArrayRecord([array + change for array, change in zip(received, delta, strict=True)])
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 7})}), reply_to=message)

    run_simulation(server, client, num_supernodes=sites, backend_config={"client_resources": {"num_cpus": 1}})
    return marks


if __name__ == "__main__":
    main()
