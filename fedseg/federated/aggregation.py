"""Join the updates of a round: a streaming weighted mean, and two robust means.

The mean is order-independent to the last bit. Each product `weight * delta` is rounded to a multiple of 2^-36 and added as
an integer; integer addition is associative, so it does not matter which site answers first, or in how many workers the
sites ran. The rounding is at most 2^-37 of one weighted update, below the resolution of float32 for weights above 1e-4.
"""

import math
from fractions import Fraction
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedseg.errors import UpdateRefused
from fedseg.federated.weights import CHUNK, FloatArray, Weights

FRACTION_BITS = 36
LOW_BITS = 32
NARROW = 2.0 ** (62 - FRACTION_BITS)
"""Largest sum of `weight * |delta|` that one 64-bit integer holds with one bit to spare; larger terms need a second."""
LARGEST = 2.0**46
"""Largest `weight * |delta|` at all: thousands of them fit into two integers. Running variances may well reach 10^6."""


Weight = int | Fraction
"""Rational, so that sums of weights are exact too."""


class Aggregator(Protocol):
    """Takes the accepted updates of one round, in any order, and joins them."""

    def fold(self, site: str, delta: Weights, weight: int, steps: int) -> None:
        """Add one update with a positive integer weight, which its site reached in so many local steps."""

    def result(self) -> Weights:
        """The joint update of at least one site."""


class StreamingMean:
    """Weighted mean whose memory does not grow with the sites (McMahan et al., arXiv 1602.05629).

    The mean of a single update is that update, to the last bit: nothing is rounded before there is a second one.
    """

    def __init__(self) -> None:
        self._only: tuple[Weights, Weight] | None = None
        self._sums: dict[str, _ExactSum] = {}
        self._total: Weight = 0
        self._bound = 0.0

    def fold(self, site: str, delta: Weights, weight: Weight, steps: int = 1) -> None:  # noqa: ARG002 - see NormalisedMean
        """Add one update.

        Raises:
            UpdateRefused: a value is too large to be added exactly; the sum is as before.
        """
        peaks = require_exact(site, delta, weight)
        self._total += weight
        if self._total == weight:
            self._only = delta, weight
            return
        if self._only is not None:
            first, first_weight = self._only
            self._only = None
            self._sums = {name: _ExactSum(array.shape) for name, array in first.items()}
            self._add(first, first_weight, _peaks(first, first_weight))
        self._add(delta, weight, peaks)

    def result(self) -> Weights:
        """The weighted mean of everything that was folded in."""
        if self._only is not None:
            return dict(self._only[0])
        return {name: total.scaled(float(1 / Fraction(self._total))) for name, total in self._sums.items()}

    def _add(self, delta: Weights, weight: Weight, peaks: dict[str, float]) -> None:
        least = 2.0 ** (LOW_BITS - FRACTION_BITS)  # what the first integer of a large term may be
        step = max(least, max((peak for peak in peaks.values() if peak < NARROW), default=0.0))
        if self._bound + step >= NARROW:
            for total in self._sums.values():
                total.carry()
            self._bound = least
        self._bound += step
        for name, array in delta.items():
            self._sums[name].add(array, weight, wide=peaks[name] >= NARROW)


def require_exact(site: str, delta: Weights, weight: Weight) -> dict[str, float]:
    """Largest `weight * |value|` of each tensor, if they can all be added exactly.

    Raises:
        UpdateRefused: one is too large for that.
    """
    peaks = _peaks(delta, weight)
    largest = float(np.max([0.0, *peaks.values()]))
    if not largest < LARGEST:
        raise UpdateRefused(
            "too-large", f"update of {site}: values up to {largest / float(weight):g} cannot be added exactly"
        )
    return peaks


def _peaks(delta: Weights, weight: Weight) -> dict[str, float]:
    """Largest `weight * |value|` of each tensor."""
    return {name: float(weight) * float(np.max(np.abs(array), initial=0.0)) for name, array in delta.items()}


class _ExactSum:
    """The sum of one tensor over sites, in units of 2^-36; bits above 2^32 units move to a second word when needed."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._low = np.zeros(math.prod(shape), np.int64)
        self._high: NDArray[np.int64] | None = None

    def add(self, array: FloatArray, weight: Weight, *, wide: bool = False) -> None:
        """Add `weight * array`, rounded to a unit; exact otherwise. `wide` takes terms that one integer cannot hold."""
        flat, unit = array.reshape(-1), math.ldexp(float(weight), FRACTION_BITS)
        scratch = np.empty(min(CHUNK, flat.size), np.float64)
        for start in range(0, flat.size, CHUNK):
            part = flat[start : start + CHUNK]
            product, low = scratch[: part.size], self._low[start : start + CHUNK]
            np.multiply(part, unit, out=product, dtype=np.float64)
            np.rint(product, out=product)
            if wide:
                carried = np.floor(product * 2.0**-LOW_BITS)
                product -= carried * 2.0**LOW_BITS
                high = self._second()[start : start + CHUNK]
                np.add(high, carried, out=high, casting="unsafe", dtype=np.int64)
            np.add(low, product, out=low, casting="unsafe", dtype=np.int64)

    def carry(self) -> None:
        """Make room: afterwards 0 <= low < 2^32."""
        self._second()[...] += self._low >> LOW_BITS
        self._low &= (1 << LOW_BITS) - 1

    def _second(self) -> NDArray[np.int64]:
        """The second integers, made when they are first needed."""
        if self._high is None:
            self._high = np.zeros_like(self._low)
        return self._high

    def scaled(self, factor: float) -> FloatArray:
        """The sum times a factor; with or without carries, the integer sum is rounded to float64 once."""
        if self._high is not None:
            self.carry()
        scaled = np.empty(self._low.size, np.float32)
        for start in range(0, scaled.size, CHUNK):
            part = slice(start, start + CHUNK)
            total = self._low[part].astype(np.float64)
            if self._high is not None:
                total += self._high[part] * 2.0**LOW_BITS
            scaled[part] = total * (factor * 2.0**-FRACTION_BITS)
        return scaled.reshape(self._shape)


class RobustMean:
    """Coordinate-wise median or trimmed mean (Yin et al., arXiv 1803.01498), each site with the same weight.

    Holds every update of the round in memory: they cannot be computed from a stream.

    Args:
        trim: share of values dropped at each end; 0.5 is the median.
    """

    def __init__(self, trim: float) -> None:
        self._trim = trim
        self._deltas: dict[str, Weights] = {}

    def fold(self, site: str, delta: Weights, weight: int, steps: int = 1) -> None:  # noqa: ARG002 - every site counts alike
        """Keep one update."""
        self._deltas[site] = delta

    def result(self) -> Weights:
        """The median or trimmed mean of all updates."""
        deltas = [self._deltas[site] for site in sorted(self._deltas)]
        return {name: self._join(np.stack([delta[name] for delta in deltas])) for name in deltas[0]}

    def _join(self, stack: FloatArray) -> FloatArray:
        """The mean of the values that are left, in float64; of one or two of them it is the median."""
        count = len(stack)
        cut = min(math.floor(self._trim * count + 1e-9), (count - 1) // 2)  # 0.29 * 100 is 28.999999999999996
        ordered = np.sort(stack, axis=0)[cut : count - cut]
        return np.asarray(ordered.mean(axis=0, dtype=np.float64), np.float32)


def make_aggregator(aggregate: str, trim: float) -> Aggregator:
    """The aggregator that `federation.aggregate` names."""
    if aggregate == "mean":
        return StreamingMean()
    return RobustMean(0.5 if aggregate == "median" else trim)
