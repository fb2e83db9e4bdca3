"""A site goes on alone from the federation's model, and keeps what that gives only if its validation cases say so.

Fine-tuning by local epochs is the plainest personalisation there is (Wang et al., arXiv 1910.10252); its danger is a site that
overfits what little it has. Halfway between both models, in their weights, most of the gain is left and little of the danger
(WiSE-FT, Wortsman et al., arXiv 2109.01903). So both are candidates after each epoch, and the federation's model is the one to
beat: halfway wins with a higher mean over the validation persons, all the way only with a gain beyond chance (Student's t,
one-sided, 95 %). Nothing of it leaves the site.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from fedseg.data.augment import mirror_pairs
from fedseg.data.patches import PatchSampler
from fedseg.device import pick_device, seed_everything
from fedseg.errors import TrainingDiverged
from fedseg.evaluation import evaluate
from fedseg.federated.exchange import put_weights, take_weights
from fedseg.federated.networks import new_model
from fedseg.federated.rounds import derive_seed
from fedseg.federated.site import Site
from fedseg.federated.weights import Weights
from fedseg.model_file import ModelFile
from fedseg.training import train_locally
from fedseg.words import counted

LEVEL = 0.95
"""Of the test that a personal model must pass; with three validation persons that takes 2.9 standard errors."""
RATE = 0.3
"""Learning rate of the epochs, as a share of the experiment's first one."""


HALFWAY = 0.5
"""Share of the site's own weights in the mean of both."""


@dataclass(frozen=True)
class Candidate:
    """A model that a site could keep."""

    epochs: int
    """Of its own; 0: the federation's model."""
    share: float
    """Of its own weights, 1 or `HALFWAY`; the rest is the federation's."""
    dice: dict[str, float]
    """By validation person."""

    @property
    def mean(self) -> float:
        """Mean Dice over the validation persons; NaN without any."""
        return statistics.fmean(self.dice.values()) if self.dice else math.nan

    def __str__(self) -> str:
        if not self.epochs:
            return "the model of the federation"
        way = "halfway to " if self.share == HALFWAY else ""
        return f"{way}{counted(self.epochs, 'epoch')} of its own"


@dataclass(frozen=True)
class Personal:
    """What a site has chosen."""

    weights: Weights
    kept: Candidate
    tried: tuple[Candidate, ...]
    """The federation's model first."""


def personalise(site: Site, model: ModelFile, epochs: int) -> Personal:
    """Train on at a site, and choose.

    Args:
        site: where the cases are.
        model: the federation's, complete.
        epochs: tried at most; the best of them is chosen.
    """
    experiment, name = model.experiment, site.config.name
    data, device = site.prepare(experiment, model.fingerprint), pick_device(site.config.device)
    training = experiment.training.model_copy(
        update={"schedule": "constant", "learning_rate": RATE * experiment.training.learning_rate}
    )
    network, scored = (new_model(experiment).to(device) for _ in range(2))
    put_weights(network, model.weights)
    sampler = PatchSampler(
        data.training.cases,
        training,
        derive_seed(experiment.seed, "personal", name),
        mirror_pairs(experiment.task.labels),
        experiment.slicing,
    )

    def by_person(weights: Weights) -> dict[str, float]:
        put_weights(scored, weights)
        scores = evaluate(
            scored, data.validation.cases, experiment.task.structures, experiment.evaluation, training.patch_size,
            device=device, precision=training.precision, slicing=experiment.slicing,
        ).by_person()  # fmt: skip
        return {person: statistics.fmean(dice) for person, dice in scores.items()}

    tried = [Candidate(0, 0.0, by_person(model.weights))]
    found: list[Weights] = [model.weights]
    for epoch in range(epochs):
        site.watch("personalising", epoch, epochs)
        seed_everything(derive_seed(experiment.seed, "personal", epoch, name))
        try:
            train_locally(network, sampler.epoch(epoch), training, device=device)
        except TrainingDiverged:
            break  # what came before it can still be chosen
        own = take_weights(network)
        for share in (HALFWAY, 1.0):
            found.append(mixed(model.weights, own, share))
            tried.append(Candidate(epoch + 1, share, by_person(found[-1])))
    kept = choose(tried)
    return Personal(found[kept], tried[kept], tuple(tried))


def mixed(first: Weights, second: Weights, share: float) -> Weights:
    """A mean of two models' weights; counters are the second's.

    Args:
        first: of one model.
        second: of the other one, same names and shapes.
        share: of the second, in [0, 1].
    """
    return {
        name: ((1 - share) * first[name] + share * tensor).astype(tensor.dtype)
        if np.issubdtype(tensor.dtype, np.floating)
        else tensor
        for name, tensor in second.items()
    }


def choose(tried: Sequence[Candidate]) -> int:
    """Which of several models a site keeps.

    Args:
        tried: the federation's model first.

    Returns:
        The number of the one with the largest mean gain, among those that may win; 0 if none may, or nobody validates.
    """
    shared = tried[0].dice
    best, gain = 0, 0.0
    for number, candidate in enumerate(tried[1:], start=1):
        gains = [candidate.dice[person] - dice for person, dice in shared.items()]
        if gains and statistics.fmean(gains) > max(gain, 0.0 if candidate.share < 1 else _chance(gains)):
            best, gain = number, statistics.fmean(gains)
    return best


def _chance(gains: Sequence[float]) -> float:
    """Mean gain that chance alone exceeds once in twenty times."""
    if len(gains) < 2:
        return math.inf
    return float(stdtrit(len(gains) - 1, LEVEL)) * statistics.stdev(gains) / math.sqrt(len(gains))
