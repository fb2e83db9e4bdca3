"""Seconds per round without any training: our local engine against Flower's simulation, doing the same FedAvg.

Run `python benchmarks/engine/bench.py [--sites 10] [--megabytes 10] [--rounds 6] [--repeats 3]`; needs the `ray` extra.
Sites answer at once with a constant update. Ours runs whole rounds: screening, exact mean, store, two checkpoints kept,
everything synced to disk; Flower's keeps nothing. A round is the time from one broadcast to the next; the first one, in
which processes warm up, is left out of the median and shown as start-up, together with the rest of the process's life.
Variants take turns, each in a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
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
        times = measure(arguments)
        print(json.dumps([after - before for before, after in pairwise(times)]))
        return
    found: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(arguments.repeats):
        for variant in VARIANTS:
            found[variant].append(in_a_process(variant))
    print(
        f"{arguments.sites} sites, {arguments.megabytes} MB, {arguments.repeats} runs of {arguments.rounds} rounds, in turns"
    )
    print(f"{'':<20} {'per round (min-max)':>28} {'start-up and end':>18} {'ours / Flower':>14}")
    theirs = statistics.median(per_round for per_round, _ in found[VARIANTS[-1]])
    for variant, runs in found.items():
        rounds = [per_round for per_round, _ in runs]
        median, rest = statistics.median(rounds), statistics.median(rest for _, rest in runs)
        print(
            f"{variant:<20} {median:>10.3f} s ({min(rounds):.3f}-{max(rounds):.3f}) {rest:>16.1f} s {median / theirs:>14.3f}"
        )


def in_a_process(variant: str) -> tuple[float, float]:
    """Median seconds per round after the first, and the other seconds of the process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--measure", variant],
        check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip
    rounds = json.loads(done.stdout.splitlines()[-1])
    return statistics.median(rounds[1:]), time.monotonic() - begun - sum(rounds[1:])


def measure(arguments: argparse.Namespace) -> list[float]:
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


def ours(fleet: InProcessFleet | WorkerFleet, arguments: argparse.Namespace) -> list[float]:
    study, times = experiment(arguments.rounds), []
    with tempfile.TemporaryDirectory(dir=arguments.output) as folder:
        store = RunStore(Path(folder))
        run_federation(
            study,
            fleet,
            store,
            lambda: initial_state(study, weights(arguments.megabytes)),
            observe=lambda event: times.append(time.monotonic()) if event.kind in ("round", "finished") else None,
        )
        store.close()
    return times


def flower(sites: int, megabytes: int, rounds: int) -> list[float]:
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    times: list[float] = []

    class Timed(FedAvg):
        def configure_train(self, *args, **kwargs):
            times.append(time.monotonic())
            return super().configure_train(*args, **kwargs)

    server, client = ServerApp(), ClientApp()

    @server.main()
    def serve(grid: Grid, _: Context) -> None:
        strategy = Timed(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
        strategy.start(grid, ArrayRecord(list(weights(megabytes).values())), num_rounds=rounds)
        times.append(time.monotonic())

    @client.train()
    def train(message: Message, _: Context) -> Message:
        delta = constant_delta(megabytes).values()
        received = message.content["arrays"].to_numpy_ndarrays()
        arrays = ArrayRecord([array + change for array, change in zip(received, delta, strict=True)])
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 7})}), reply_to=message)

    run_simulation(server, client, num_supernodes=sites, backend_config={"client_resources": {"num_cpus": 1}})
    return times


if __name__ == "__main__":
    main()
