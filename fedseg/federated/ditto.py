"""Ditto (Li et al., arXiv 2012.04221): a network of a site's own, which never leaves it, pulled to what all share.

In every round the site first trains for the federation as in FedAvg; then its own network takes as many steps on the same kind of
batches, with (lambda/2)||v - w||^2 towards the weights w that it received. Lambda 0 is training alone; a large one, the
federation's network.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedseg.config import Experiment
from fedseg.data.augment import mirror_pairs
from fedseg.data.patches import PatchSampler
from fedseg.data.preprocess import PreparedCase
from fedseg.device import seed_everything
from fedseg.federated.exchange import put_weights, take_weights
from fedseg.federated.messages import RoundInstructions
from fedseg.federated.private import PrivateTensors
from fedseg.federated.rounds import derive_seed
from fedseg.federated.weights import Weights
from fedseg.training import train_locally


def personal_tensors(state: Path, document: str, site: str, weights: Weights) -> PrivateTensors:
    """Where a site keeps its own network.

    Args:
        state: the site's folder for what must outlive a round.
        document: the experiment's JSON as the server sends it.
        site: its name.
        weights: with the names of the network's tensors.
    """
    return PrivateTensors(state / "personal", document, site, weights)


def train_personal(
    kept: PrivateTensors,
    model: nn.Module,
    instructions: RoundInstructions,
    experiment: Experiment,
    cases: Sequence[PreparedCase],
    site: str,
    device: torch.device,
) -> None:
    """Take a round's steps with the site's own network, and keep it.

    Args:
        kept: where it is; before its first round the received weights take its place.
        model: a network to do it with; overwritten.
        instructions: of the round.
        experiment: decides lambda, steps and learning rate.
        cases: to train on.
        site: decides seeds.
        device: where to train.

    Raises:
        TrainingDiverged: the loss became non-finite.
        StoreError: what was kept is damaged.
    """
    number, received, federation = instructions.server_round, instructions.weights, experiment.federation
    put_weights(model, kept.before(number, received) or received)
    kept.begin(number, received)
    seed = derive_seed(experiment.seed, "own patches", site)
    sampler = PatchSampler(cases, experiment.training, seed, mirror_pairs(experiment.task.labels), experiment.slicing)
    seed_everything(derive_seed(experiment.seed, "own training", number, site))
    first = (number - 1) * federation.local_epochs
    batches = (batch for epoch in range(first, first + federation.local_epochs) for batch in sampler.epoch(epoch))
    train_locally(
        model,
        batches,
        experiment.training,
        anchor={name: torch.from_numpy(np.array(received[name])) for name, _ in model.named_parameters()},
        proximal_mu=federation.personal_lambda or 0.0,
        progress=(number - 1) / federation.rounds,
        device=device,
    )
    kept.save(number, received, take_weights(model))
