"""What the inputs of a federation look like: label-free statistics of images, summed over cases.

A site sends sums and sums of squares over its training cases, never a case's values. The server adds them up once, before
round 1, and every site gets the result: it can tell how unusual its own images are (`fedseg.drift`), and whether bright and dark
are reversed against the others.

Reversal is found by the layout: coarse block means of the image, where it is bright and where it is dark. Measured against rules
that look at intensities alone (skewness, histograms), it is the one that noise, shading and contrast curves do not mislead:
simulations/LOG.md. Its sign is a vote: reversed are those who disagree with the others, weighted by cases.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

AXES = ("D", "H", "W")
PERCENTAGES = (5, 25, 50, 75, 95)
"""Of the intensities' quantiles; symmetric, so that those of the negated image are known."""
GRID = 4
"""Blocks of the layout along each axis."""
LAYOUT = GRID**3
"""Numbers of one channel's layout."""
MOST_FEATURES, MOST_CHANNELS, LONGEST_NAME = 500, 16, 40
LARGEST = 1e9
"""No sum that makes sense is larger."""

Signs = tuple[int, ...]
"""By channel: 1, or -1 where bright and dark are reversed."""


@dataclass(frozen=True)
class CaseFeatures:
    """The statistics of one image."""

    values: dict[str, float]
    """By name; those of a channel end with its number."""
    layout: tuple[float, ...]
    """`LAYOUT` block means of each channel, one channel after the other."""


@dataclass(frozen=True)
class Fingerprint:
    """Sums over the cases of one site or of a whole federation."""

    cases: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)
    layout: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return self.cases > 0

    def mean(self, name: str) -> float:
        """Mean of a feature."""
        return self.sums[name] / self.cases

    def spread(self, name: str) -> float:
        """Standard deviation of a feature from case to case."""
        centred = self.squares[name] - self.sums[name] ** 2 / self.cases
        return math.sqrt(max(centred, 0.0) / max(self.cases - 1, 1))

    def agreement(self, layout: Iterable[float]) -> tuple[float, ...]:
        """Correlation of a layout with this one, by channel: 1 the same, below 0 reversed, 0 where either is flat."""
        mine, other = _channels(self.layout), _channels(layout)
        return tuple(_correlation(a, b) for a, b in zip(mine, other, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; empty if there are no cases."""
        if not self:
            return {}
        return {"cases": self.cases, "sums": self.sums, "squares": self.squares, "layout": list(self.layout)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: it is something else, or holds numbers that cannot be sums over so many cases.
        """
        if not values:
            return cls()
        if set(values) != {"cases", "sums", "squares", "layout"}:
            raise ValueError("a fingerprint has cases, sums, squares and layout")
        cases, sums, squares, blocks = (values[key] for key in ("cases", "sums", "squares", "layout"))
        if type(cases) is not int or not 0 < cases <= LARGEST:
            raise ValueError("cases must be a positive number")
        if not isinstance(sums, dict) or not isinstance(squares, dict) or sums.keys() != squares.keys():
            raise ValueError("sums and squares must be of the same features")
        if len(sums) > MOST_FEATURES or any(not name.isprintable() or len(name) > LONGEST_NAME for name in sums):
            raise ValueError(f"there can be {MOST_FEATURES} features, with printable names")
        if not isinstance(blocks, list) or len(blocks) % LAYOUT or not 0 < len(blocks) <= LAYOUT * MOST_CHANNELS:
            raise ValueError(f"the layout must have {LAYOUT} numbers per channel")
        numbers = [*sums.values(), *squares.values(), *blocks]
        if not all(type(n) in (int, float) and math.isfinite(n) and abs(n) <= LARGEST for n in numbers):
            raise ValueError("all numbers must be finite and not absurdly large")
        if any(squares[name] * cases < sums[name] ** 2 * (1 - 1e-6) - 1e-6 for name in sums):
            raise ValueError("sums of squares are smaller than they can be")
        return cls(
            cases,
            {k: float(v) for k, v in sums.items()},
            {k: float(v) for k, v in squares.items()},
            tuple(map(float, blocks)),
        )


UNKNOWN = Fingerprint()
"""Of no cases."""


def fingerprint_of(cases: Iterable[CaseFeatures]) -> Fingerprint:
    """The sums over cases, whatever their order; all must have the same features."""
    found = list(cases)
    if not found:
        return UNKNOWN
    names = list(found[0].values)
    return Fingerprint(
        len(found),
        {name: math.fsum(case.values[name] for case in found) for name in names},
        {name: math.fsum(case.values[name] ** 2 for case in found) for name in names},
        tuple(math.fsum(column) for column in zip(*(case.layout for case in found), strict=True)),
    )


def joined(sites: Mapping[str, Fingerprint], *, aligned: bool) -> Fingerprint:
    """The federation's fingerprint; the order of the sites does not matter.

    Its layout is that of the majority: sites that are reversed against it count with their layout negated.

    Args:
        sites: fingerprints by name of the site.
        aligned: reversed sites will negate their images, so their intensities count negated too.
    """
    known = {name: sites[name] for name in sorted(sites) if sites[name]}
    if not known:
        return UNKNOWN
    first = next(iter(known.values()))
    same = {n: f for n, f in known.items() if f.sums.keys() == first.sums.keys() and len(f.layout) == len(first.layout)}
    signs = vote(same)
    turned = [reversed_(f, signs[n], intensities=aligned) for n, f in same.items()]
    return Fingerprint(
        sum(f.cases for f in turned),
        {name: math.fsum(f.sums[name] for f in turned) for name in first.sums},
        {name: math.fsum(f.squares[name] for f in turned) for name in first.sums},
        tuple(math.fsum(column) for column in zip(*(f.layout for f in turned), strict=True)),
    )


def vote(sites: Mapping[str, Fingerprint]) -> dict[str, Signs]:
    """Which sites are reversed against the majority, by channel.

    The signs are those that agree best: of the leading eigenvector of the sites' correlations weighted by cases. Whoever has
    more cases is as it is; with a tie, the site whose name comes first.
    """
    names = sorted(sites)
    if not names:
        return {}
    weights = np.array([sites[name].cases for name in names], dtype=np.float64)
    channels = [_channels(sites[name].layout) for name in names]
    votes = []
    for number in range(len(channels[0])):
        correlations = np.array([[_correlation(a[number], b[number]) for b in channels] for a in channels])
        leading = np.linalg.eigh(correlations * np.sqrt(np.outer(weights, weights)))[1][:, -1]
        signs = np.where(leading < 0, -1, 1)
        total = float(signs @ weights)
        votes.append(-signs if total < 0 or (total == 0 and signs[0] < 0) else signs)
    return {name: tuple(int(signs[index]) for signs in votes) for index, name in enumerate(names)}


def polarity(layouts: Iterable[Sequence[float]], federation: Fingerprint) -> Signs:
    """Which channels of images must be negated to agree with the federation's: one decision for all of them.

    Args:
        layouts: of the images as they are, of one or of all cases of a site.
        federation: as `joined`; empty: nothing is negated.
    """
    together = [math.fsum(column) for column in zip(*layouts, strict=True)]
    if not federation or len(together) != len(federation.layout):
        return (1,) * (len(together) // LAYOUT)
    return tuple(-1 if value < 0 else 1 for value in federation.agreement(together))


def reversed_(found: Fingerprint, signs: Signs, *, intensities: bool = True) -> Fingerprint:
    """The fingerprint of the images with some channels negated.

    Args:
        found: of the images as they are.
        signs: by channel.
        intensities: False: only the layout is turned.
    """
    blocks = np.array(found.layout).reshape(len(signs), LAYOUT) * np.array(signs)[:, None]
    turned = replace(found, layout=tuple(blocks.ravel().tolist()))
    if not intensities:
        return turned
    sums, squares = dict(found.sums), dict(found.squares)
    for number, sign in enumerate(signs):
        for low, high in zip(PERCENTAGES, reversed(PERCENTAGES), strict=True):
            name, mirrored = f"intensity {low} % #{number}", f"intensity {high} % #{number}"
            if sign < 0 and name in found.sums and mirrored in found.sums:
                sums[name], squares[name] = -found.sums[mirrored], found.squares[mirrored]
    return replace(turned, sums=sums, squares=squares)


def _channels(layout: Iterable[float]) -> NDArray[np.float64]:
    return np.array(list(layout), dtype=np.float64).reshape(-1, LAYOUT)


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    one, other = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / scale if scale > 1e-12 else 0.0
