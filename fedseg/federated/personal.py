"""A site goes on alone from the federation's model, and keeps what that gives only if its validation cases say so.

Fine-tuning by local epochs is the plainest personalisation there is (Wang et al., arXiv 1910.10252); its danger is a site that
overfits what little it has. So the epochs are candidates, and the federation's model is the one to beat: a personal model wins if
its mean gain over the validation persons is beyond chance (Student's t, one-sided, 95 %). Nothing of it leaves the site.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

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

LEVEL = 0.95
"""Of the test that a personal model must pass; with three validation persons that takes 2.9 standard errors."""
RATE = 0.3
"""Learning rate of the epochs, as a share of the experiment's first one."""


@dataclass(frozen=True)
class Personal:
    """What a site has chosen."""

    weights: Weights
    epochs: int
    """Of its own, in what it keeps; 0: the federation's model."""
    dice: tuple[float, ...]
    """Mean Dice over its validation persons after 0, 1, ... epochs of its own; NaN without any."""


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
    network = new_model(experiment).to(device)
    put_weights(network, model.weights)
    sampler = PatchSampler(
        data.training.cases,
        training,
        derive_seed(experiment.seed, "personal", name),
        mirror_pairs(experiment.task.labels),
        experiment.slicing,
    )

    def by_person() -> dict[str, float]:
        scores = evaluate(
            network, data.validation.cases, experiment.task.structures, experiment.evaluation, training.patch_size,
            device=device, precision=training.precision, slicing=experiment.slicing,
        ).by_person()  # fmt: skip
        return {person: statistics.fmean(dice) for person, dice in scores.items()}

    scores, candidates = [by_person()], [model.weights]
    for epoch in range(epochs):
        site.watch("personalising", epoch, epochs)
        seed_everything(derive_seed(experiment.seed, "personal", epoch, name))
        try:
            train_locally(network, sampler.epoch(epoch), training, device=device)
        except TrainingDiverged:
            break  # what came before it can still be chosen
        candidates.append(take_weights(network))
        scores.append(by_person())
    kept = choose(scores)
    means = tuple(statistics.fmean(dice.values()) if dice else math.nan for dice in scores)
    return Personal(candidates[kept], kept, means)


def choose(scores: Sequence[dict[str, float]]) -> int:
    """Which of several models a site keeps.

    Args:
        scores: Dice by validation person, of the federation's model first.

    Returns:
        The number of the best one whose mean gain is beyond chance; 0 with fewer than two persons.
    """
    shared = scores[0]
    best, gain = 0, 0.0
    for number, own in enumerate(scores[1:], start=1):
        gains = [own[person] - dice for person, dice in shared.items()]
        if len(gains) < 2:
            return 0
        mean, error = statistics.fmean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
        if mean > max(gain, float(stats.t.ppf(LEVEL, len(gains) - 1)) * error):
            best, gain = number, mean
    return best
