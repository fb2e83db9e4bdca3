"""Join the updates of a round: a streaming weighted mean, and two robust means.

The mean is order-independent to the last bit. Each product `weight * delta` is rounded to a multiple of 2^-36 and added as
a 64-bit integer; integer addition is associative, so it does not matter which site answers first, or in how many workers
the sites ran. The rounding is 2^-37 of one weighted update, below the resolution of float32 for values above 1e-4 / n.
"""

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedseg.errors import UpdateRefused
from fedseg.federated.weights import CHUNK, FloatArray, Weights

FRACTION_BITS = 36
LARGEST_SUM = 2.0 ** (62 - FRACTION_BITS)


class Aggregator(Protocol):
    """Takes the accepted updates of one round, in any order, and joins them."""

    def fold(self, site: str, delta: Weights, weight: int) -> None:
        """Add one update with a positive integer weight."""

    def result(self) -> Weights:
        """The joint update."""


class StreamingMean:
    """Weighted mean whose memory is one network, however many sites there are (McMahan et al., arXiv 1602.05629)."""

    def __init__(self) -> None:
        self._sums: dict[str, NDArray[np.int64]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._total = 0
        self._largest = 0.0

    def fold(self, site: str, delta: Weights, weight: int) -> None:
        """Add one update.

        Raises:
            UpdateRefused: a value is too large to be added exactly; the sum is as before.
        """
        largest = weight * max((float(np.max(np.abs(array), initial=0.0)) for array in delta.values()), default=0.0)
        if not self._largest + largest < LARGEST_SUM:
            raise UpdateRefused(
                "too-large", f"update of {site}: values up to {largest / weight:g} cannot be added exactly"
            )
        self._largest += largest
        self._total += weight
        scale = math.ldexp(weight, FRACTION_BITS)
        scratch = np.empty(CHUNK, np.float64)
        for name, array in delta.items():
            if name not in self._sums:
                self._sums[name] = np.zeros(array.size, np.int64)
                self._shapes[name] = array.shape
            flat, total = array.reshape(-1), self._sums[name]
            for start in range(0, flat.size, CHUNK):
                part = slice(start, min(start + CHUNK, flat.size))
                product = scratch[: part.stop - start]
                np.multiply(flat[part], scale, out=product, dtype=np.float64)
                np.rint(product, out=product)
                np.add(total[part], product, out=total[part], casting="unsafe", dtype=np.int64)

    def result(self) -> Weights:
        """The weighted mean of everything that was folded in."""
        step = 1.0 / (self._total * 2.0**FRACTION_BITS)
        return {
            name: (total * step).astype(np.float32).reshape(self._shapes[name]) for name, total in self._sums.items()
        }


class RobustMean:
    """Coordinate-wise median or trimmed mean (Yin et al., arXiv 1803.01498), each site with the same weight.

    Holds every update of the round in memory: they cannot be computed from a stream.

    Args:
        trim: share of values dropped at each end; 0.5 is the median.
    """

    def __init__(self, trim: float) -> None:
        self._trim = trim
        self._deltas: dict[str, Weights] = {}

    def fold(self, site: str, delta: Weights, weight: int) -> None:  # noqa: ARG002 - robust means weigh every site alike
        """Keep one update."""
        self._deltas[site] = delta

    def result(self) -> Weights:
        """The median or trimmed mean of all updates."""
        deltas = [self._deltas[site] for site in sorted(self._deltas)]
        return {name: self._join(np.stack([delta[name] for delta in deltas])) for name in deltas[0]}

    def _join(self, stack: FloatArray) -> FloatArray:
        if self._trim >= 0.5:
            return np.median(stack, axis=0).astype(np.float32)
        ordered = np.sort(stack, axis=0)
        cut = int(self._trim * len(stack))
        return ordered[cut : len(stack) - cut].mean(axis=0, dtype=np.float64).astype(np.float32)


def make_aggregator(aggregate: str, trim: float) -> Aggregator:
    """The aggregator that `federation.aggregate` names."""
    if aggregate == "mean":
        return StreamingMean()
    return RobustMean(0.5 if aggregate == "median" else trim)
