"""Differences between two models that have segmented the same persons."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from fedseg.robustness.resampling import Resampling, Value, estimate

Cases = Mapping[tuple[str, ...], Value]
"""What a model got at each hospital for each case (and structure)."""


def paired(rows: Mapping[str, Cases], pairs: Sequence[tuple[str, str]], draws: Resampling) -> list[dict[str, Any]]:
    """The difference in Dice points of each pair with its interval, and Wilcoxon's test, corrected for the number of pairs.

    The difference is a mean over cases, as Dice itself is; persons are what is drawn and what is tested.

    Args:
        rows: Dice of each row (a model, a method).
        pairs: rows to compare; pairs that share no case are left out.
        draws: of the persons.

    Returns:
        For each pair `rows`, `persons` (how many both have), `difference`, `p` and `p_holm`.
    """
    found: list[dict[str, Any]] = []
    for one, other in pairs:
        shared = sorted(rows[one].keys() & rows[other].keys())
        if not shared:
            continue
        points = [
            Value(rows[one][case].person, 100 * (rows[one][case].value - rows[other][case].value)) for case in shared
        ]
        persons, difference = person_means(points), estimate(draws.mean(points))
        p = wilcoxon([*persons.values()])
        found.append({"rows": [one, other], "persons": len(persons), "difference": difference, "p": p})
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


def person_means(values: Sequence[Value]) -> dict[str, float]:
    """Each person's mean."""
    grouped: dict[str, list[float]] = {}
    for one in values:
        grouped.setdefault(one.person, []).append(one.value)
    return {person: float(np.mean(of_person)) for person, of_person in grouped.items()}
