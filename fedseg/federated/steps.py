"""What a site's local steps amount to, and the algorithms that make up for differences in them.

FedNova (Wang et al., arXiv 2007.07481): sites that take more steps pull the mean towards their own optimum. Each update is
divided by what its steps amount to, the mean of these directions is multiplied by what they amount to on average.

SCAFFOLD (Karimireddy et al., arXiv 1910.06378, option II): a site adds to every gradient what the federation's mean gradient
differs from its own. Its own, `c_i`, is its last update over the steps and the learning rate that made it. The server, which got
the update, can work out as much; so nothing but the update ever goes up, and the server's control `c` is what comes down.
"""

from collections.abc import Collection, Mapping
from fractions import Fraction

import numpy as np

from fedseg.config import TrainingConfig
from fedseg.errors import UpdateRefused
from fedseg.federated.aggregation import StreamingMean, require_exact
from fedseg.federated.weights import FloatArray, Weights
from fedseg.schedule import learning_rate

MOST_STEPS = 10_000_000


def reported_steps(site: str, training: Mapping[str, float]) -> int:
    """The steps that a site says it has taken.

    Raises:
        UpdateRefused: it says none, or no number of steps.
    """
    steps = training.get("steps", 0.0)
    if not (1 <= steps <= MOST_STEPS and steps == int(steps)):
        raise UpdateRefused("steps", f"update of {site}: {steps!r} is no number of local steps")
    return int(steps)


def amount(steps: int, config: TrainingConfig) -> float:
    """What so many local steps amount to, in plain gradient steps: FedNova's ||a||_1.

    With momentum rho a gradient goes on to act; under Nesterov's rule, with a new optimizer in every round, the gradient of
    the step that is followed by m others counts (1 - rho^(m + 2)) / (1 - rho) times. AdamW's steps are counted as they are.
    """
    if config.optimizer != "sgd" or config.momentum == 0:
        return float(steps)
    rho = config.momentum
    return float((steps - rho**2 * (1 - rho**steps) / (1 - rho)) / (1 - rho))


class NormalisedMean:
    """FedNova's mean; exact and independent of the order, as the plain one. Batch statistics take the plain mean.

    Args:
        config: decides what steps amount to.
        buffers: names of tensors that are no parameters.
    """

    def __init__(self, config: TrainingConfig, buffers: Collection[str]) -> None:
        self._config, self._buffers = config, frozenset(buffers)
        self._directions, self._statistics = StreamingMean(), StreamingMean()
        self._cases, self._per_step, self._steps = Fraction(0), Fraction(0), Fraction(0)

    def fold(self, site: str, delta: Weights, weight: int, steps: int) -> None:
        """Add one update.

        Raises:
            UpdateRefused: a value is too large to be added exactly.
        """
        taken = Fraction(amount(steps, self._config))
        parameters = {name: array for name, array in delta.items() if name not in self._buffers}
        statistics = {name: array for name, array in delta.items() if name in self._buffers}
        require_exact(site, statistics, weight)  # before the first of the two sums takes it in
        self._directions.fold(site, parameters, weight / taken)
        if statistics:
            self._statistics.fold(site, statistics, weight)
        self._cases += weight
        self._per_step += weight / taken
        self._steps += weight * taken

    def result(self) -> Weights:
        """The joint update."""
        # the mean with weights n/a, times what makes it sum(p a) * sum(p d/a) for p = n / sum(n); 1 if all a are the same
        factor = np.float32(float(self._per_step * self._steps / self._cases**2))
        joined = {name: factor * array for name, array in self._directions.result().items()}
        return joined | (self._statistics.result() if self._buffers else {})


class Controls:
    """SCAFFOLD at the server: the sites' mean gradients of one round.

    Args:
        config: the experiment's training.
        progress: of the round, which decides the learning rate.
        buffers: names of tensors that are no parameters.
    """

    def __init__(self, config: TrainingConfig, progress: float, buffers: Collection[str]) -> None:
        self._config, self._rate, self._buffers = config, learning_rate(config, progress), frozenset(buffers)
        self._mean, self._count = StreamingMean(), 0

    def gradient(self, site: str, delta: Weights, steps: int) -> Weights:
        """The gradient that one update stands for.

        Raises:
            UpdateRefused: it is too large to be added exactly.
        """
        found = mean_gradient(delta, steps, self._config, self._rate, self._buffers)
        require_exact(site, found, 1)
        return found

    def fold(self, site: str, gradient: Weights) -> None:
        """Add a gradient, each site with the same weight."""
        self._mean.fold(site, gradient, 1)
        self._count += 1

    def after(self, before: Weights | None, num_sites: int) -> Weights:
        """The server's control after the round: c + |S|/N (mean of c_i+ - c_i), where c_i+ - c_i = gradient_i - c."""
        share = np.float32(self._count / max(num_sites, self._count))
        mean = self._mean.result()
        if before is None:
            return {name: share * array for name, array in mean.items()}
        return {name: before[name] + share * (array - before[name]) for name, array in mean.items()}


def mean_gradient(
    delta: Mapping[str, FloatArray], steps: int, config: TrainingConfig, rate: float, buffers: Collection[str]
) -> Weights:
    """The gradient that, taken so often, would have made an update: -delta / (rate * amount of steps)."""
    factor = np.float32(-1 / (rate * amount(steps, config)))
    return {name: factor * array for name, array in delta.items() if name not in buffers}
