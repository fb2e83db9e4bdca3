"""Every figure with an interval: the same statistic of the persons there are, and of persons drawn with replacement.

A person's cases are drawn together, and all figures use the same draws, so that differences are paired (percentile bootstrap).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Estimate = dict[str, float | list[float] | None]
"""`value`, and `ci95`: low and high; None where it is undefined."""

DRAWS = 2000


@dataclass(frozen=True)
class Value:
    """A number that belongs to a person's case."""

    person: str
    value: float


class Resampling:
    """Draws of persons.

    A statistic is an array whose first entry is that of the persons as they are, and whose others are those of the draws.

    Args:
        persons: all of them.
        draws: how many.
        seed: the same one draws the same persons.
    """

    def __init__(self, persons: Sequence[str], *, draws: int = DRAWS, seed: int = 0) -> None:
        names = sorted(set(persons))
        self._number = {name: number for number, name in enumerate(names)}
        drawn = np.random.default_rng(seed).integers(0, len(names), size=(draws, len(names)))
        counts = [np.bincount(draw, minlength=len(names)) for draw in drawn]
        self.weights_NP = np.array([np.ones(len(names), dtype=np.int64), *counts], dtype=np.float64)
        """How often each person is there."""

    def mean(self, values: Sequence[Value]) -> Floats:
        """Mean over cases; NaN where none of their persons was drawn. Values that are NaN are left out."""
        known = [one for one in values if not math.isnan(one.value)]
        persons, numeric = [one.person for one in known], np.array([one.value for one in known])
        return self.ratio(persons, numeric, np.ones(len(known)))

    def ratio(self, persons: Sequence[str], above: Floats, below: Floats) -> Floats:
        """Sum over cases divided by sum over cases."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.sums(persons, above) / self.sums(persons, below))

    def sums(self, persons: Sequence[str], values: Floats) -> Floats:
        """Sums over cases; values may have further axes, which are kept: `(draws + 1, ...)`."""
        by_person = np.zeros((self.weights_NP.shape[1], *values.shape[1:]))
        np.add.at(by_person, [self._number[person] for person in persons], values)
        return np.tensordot(self.weights_NP, by_person, axes=1)

    def case_weights(self, persons: Sequence[str]) -> Floats:
        """How often each case is there, given the cases' persons: `(draws + 1, cases)`."""
        return self.weights_NP[:, [self._number[person] for person in persons]]

    def quantile(self, values: Sequence[Value], share: float) -> Floats:
        """A quantile over cases."""
        numbers = np.array([self._number[one.person] for one in values], dtype=np.int64)
        numeric = np.array([one.value for one in values])
        drawn = (np.repeat(numeric, weights[numbers].astype(np.int64)) for weights in self.weights_NP)
        return np.array([np.quantile(one, share) if len(one) else math.nan for one in drawn])


def estimate(statistic: Floats) -> Estimate:
    """The value and its 95 % interval."""
    value, drawn = float(statistic[0]), statistic[1:]
    known = drawn[np.isfinite(drawn)]
    if not math.isfinite(value) or not len(known):
        return {"value": value if math.isfinite(value) else None, "ci95": None}
    return {"value": value, "ci95": [float(one) for one in np.quantile(known, [0.025, 0.975])]}
