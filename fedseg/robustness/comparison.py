"""Which rows differ: paired over persons, each of whom every row has segmented through every hospital's scanner."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from fedseg.robustness.networks import Row
from fedseg.robustness.resampling import Resampling, Value, estimate
from fedseg.robustness.results import Results, dice
from fedseg.robustness.views import View


def comparisons(
    rows: Sequence[Row], views: Sequence[View], results: Results, draws: Resampling
) -> list[dict[str, Any]]:
    """Every pair of rows: the difference in Dice points with its interval, and Wilcoxon's test, corrected for their number."""
    persons = {row.name: _by_person([v for view in views for v in results.values(row, view, dice)]) for row in rows}
    found: list[dict[str, Any]] = []
    for one, other in itertools.combinations(persons, 2):
        shared = sorted(persons[one].keys() & persons[other].keys())
        if not shared:
            continue
        points = [100 * (persons[one][person] - persons[other][person]) for person in shared]
        difference = estimate(draws.mean([Value(*pair) for pair in zip(shared, points, strict=True)]))
        found.append({"rows": [one, other], "persons": len(shared), "difference": difference, "p": wilcoxon(points)})
    for pair, corrected in zip(found, holm([pair["p"] for pair in found]), strict=True):
        pair["p_holm"] = corrected
    return found


def wilcoxon(differences: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; 1 if there is no difference at all."""
    values = np.asarray(differences)
    return 1.0 if not values.any() else float(stats.wilcoxon(values).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Corrected for the number of tests (Holm 1979): the chance of a single false finding among them stays at its level."""
    corrected, largest = [1.0] * len(p), 0.0
    for rank, number in enumerate(sorted(range(len(p)), key=lambda index: p[index])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[number]))
        corrected[number] = largest
    return corrected


def _by_person(values: Sequence[Value]) -> dict[str, float]:
    grouped: dict[str, list[float]] = {}
    for one in values:
        grouped.setdefault(one.person, []).append(one.value)
    return {person: math.fsum(of_person) / len(of_person) for person, of_person in grouped.items()}
