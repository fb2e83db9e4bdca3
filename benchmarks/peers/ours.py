"""fedseg: the whole round, with screening, exact mean, run store and durable checkpoints."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from job import ROUNDS, SITES, loss_of, make_model, make_volumes, report, train_step

from fedseg.config import parse_experiment
from fedseg.federated.driver import run_federation
from fedseg.federated.exchange import buffer_names, put_weights, take_weights
from fedseg.federated.local import InProcessFleet
from fedseg.federated.messages import RoundInstructions, SiteUpdate
from fedseg.federated.rounds import initial_state
from fedseg.federated.store import RunStore
from fedseg.federated.weights import subtract

EXPERIMENT = {
    "name": "tiny3d",
    "task": {"name": "balls", "modality": "mr", "labels": {"background": 0, "ball": 1}},
    "model": {"name": "unet"},
    "training": {"patch_size": [16, 16, 16]},
    "federation": {"rounds": ROUNDS, "min_sites": SITES, "evaluate_every": ROUNDS},
}

model = make_model()
volumes = {f"site-{site}": tuple(map(torch.from_numpy, make_volumes(site))) for site in range(SITES)}


def ask(site: str, instructions: RoundInstructions) -> SiteUpdate:
    put_weights(model, instructions.weights)
    image, label = volumes[site]
    sums, delta = {}, {}
    if instructions.evaluate:
        with torch.no_grad():
            sums = {"cases": 4.0, "loss/all/sum": 4 * float(loss_of(model, image, label)), "loss/all/count": 4.0}
    if instructions.train:
        train_step(model, image, label)
        delta = subtract(take_weights(model), instructions.weights)
    return SiteUpdate(site, instructions.server_round, delta, 4, sums)


experiment = parse_experiment(json.dumps(EXPERIMENT))
with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
    store = RunStore(Path(folder))
    start = initial_state(experiment, take_weights(model), buffer_names(model))
    final = run_federation(experiment, InProcessFleet(list(volumes), ask), store, lambda: start)
    store.close()
put_weights(model, final.weights)
report(model)
