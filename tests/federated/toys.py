"""A federation without torch: sites that answer with deltas worked out from what they were sent."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedseg.config import Experiment, parse_experiment
from fedseg.federated import local
from fedseg.federated.driver import run_federation
from fedseg.federated.local import InProcessFleet
from fedseg.federated.messages import Answer, RoundInstructions, SiteFailure, SiteUpdate
from fedseg.federated.rounds import ServerState, derive_seed, initial_state
from fedseg.federated.store import RunStore
from fedseg.federated.weights import Weights

SITES = ("A", "B", "C")
PRELOAD = ("tests.federated.toys", *local.PRELOAD)
"""What all workers share from the start: there is one fork server per test session, filled by whoever needs it first."""


def toy_experiment(**federation) -> Experiment:
    """An experiment whose network nobody builds."""
    document = {
        "name": "toy",
        "task": {"name": "toy", "modality": "mr", "labels": {"background": 0, "liver": 1}},
        "model": {"name": "unet", "options": {"widths": [4, 8]}},
        "training": {"patch_size": [8, 8, 8]},
        "federation": {"rounds": 3} | federation,
    }
    return parse_experiment(json.dumps(document))


def toy_weights(seed=0, scale=1.0) -> Weights:
    """Tensors of several shapes, one of them without dimensions and one empty."""
    generator = np.random.default_rng(seed)
    shapes = {"conv": (4, 3, 3), "bias": (5,), "temperature": (), "none": (0, 2), "norm.running_var": (4,)}
    return {
        name: np.asarray(scale * np.abs(generator.standard_normal(shape)) + 0.1, np.float32)
        for name, shape in shapes.items()
    }


def toy_state(experiment) -> ServerState:
    """The state before round 1."""
    return initial_state(experiment, toy_weights(), {"norm.running_var"})


def toy_update(site, instructions: RoundInstructions) -> SiteUpdate:
    """A site pulls the weights towards its own; a little noise depends on the round."""
    goal = toy_weights(derive_seed(site))
    noise = np.random.default_rng(derive_seed(site, instructions.server_round))
    delta = {
        name: np.asarray(0.3 * (goal[name] - array) + 0.01 * noise.standard_normal(array.shape), np.float32)
        for name, array in sorted(instructions.weights.items())
    }
    number = derive_seed(site) % 5 + 1
    dice = float(np.abs(instructions.weights["conv"]).mean())
    sums = {"cases": 2.0, "failures": 0.0, "dice/liver/sum": dice, "dice/liver/count": 2.0}
    return SiteUpdate(
        site,
        instructions.server_round,
        delta if instructions.train else {},
        number,
        sums if instructions.evaluate else {},
        {"loss": dice},
        {"missing-label": 1},
    )


def ask_toy(site, instructions) -> Answer:
    """Ask a site of this name."""
    return toy_update(site, instructions)


def make_ask():
    """For worker processes. The names of sites decide how they behave."""

    def ask(site, instructions):
        if site.startswith("slow"):
            time.sleep(60)
        if site.startswith("crash") and instructions.server_round == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if site.startswith("fail"):
            return SiteFailure(site, instructions.server_round, "failed", "ValueError")
        return toy_update(site, instructions)

    return ask


def changed_fleet(change, sites=SITES, ask=ask_toy):
    """A fleet whose answers pass through `change(site, instructions, answer)` first."""

    def changed(site, instructions):
        return change(site, instructions, ask(site, instructions))

    return InProcessFleet(sites, changed)


def run_toy(experiment, output: Path, fleet=None, **options) -> ServerState:
    """Run a federation of toys into a directory."""
    store = RunStore(output)
    try:
        fleet = fleet or InProcessFleet(SITES, ask_toy)
        return run_federation(experiment, fleet, store, lambda: toy_state(experiment), **options)
    finally:
        store.close()


def rows(output: Path, query: str):
    """Rows of a run store."""
    store = RunStore(output)
    try:
        return store.rows(query)
    finally:
        store.close()


def history(output: Path):
    """Everything in a run store that does not depend on the clock."""
    tables = {
        "rounds": "server_round, attempts, asked, checkpoint, checkpoint_sha256, weights_sha256",
        "updates": "server_round, site, status, reason, num_cases, norm, bytes, training, quarantined, cosine",
        "metrics": "server_round, site, name, value",
        "runs": "run, name, experiment, digest, finished IS NOT NULL AS finished",
    }
    return {table: rows(output, f"SELECT {columns} FROM {table} ORDER BY 1, 2, 3") for table, columns in tables.items()}


def same(one: Weights, other: Weights) -> bool:
    """Whether two sets of weights are equal to the last bit."""
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape and one[name].tobytes() == other[name].tobytes() for name in one
    )


def with_delta(update: SiteUpdate, **arrays) -> SiteUpdate:
    """The update with some tensors replaced."""
    return replace(update, delta=update.delta | arrays)
