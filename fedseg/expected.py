"""What a scenario's file says should come out, and whether it did."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import FiniteFloat

from fedseg.config import PositiveFloat, Section

Figure = Literal["dice", "worst_site", "unseen", "R", "W", "G", "unseen_gain"]
"""Dice as `dice` (mean over sites), `worst_site` and `unseen`; `R` in percent; `W`, `G` and `unseen_gain` (what unseen
hospitals have more than with the pooled model) in Dice points."""


FIGURES: dict[Figure, tuple[str, int]] = {
    "dice": ("Dice", 3),
    "worst_site": ("worst site", 3),
    "unseen": ("unseen", 3),
    "R": ("R %", 1),
    "W": ("W pt", 1),
    "G": ("G pt", 1),
    "unseen_gain": ("unseen against pooled pt", 1),
}
"""What each figure is called, and its decimals."""


class Expected(Section):
    """A figure that was measured before."""

    value: FiniteFloat
    tolerance: PositiveFloat
    """Either way; wide enough for another seed and another machine."""


def figures(result: Mapping[str, Any], method: str) -> dict[Figure, float]:
    """A method's figures in what `result.json` holds; those that are not defined are not in it."""
    final, head = result["final"][method], result["headline"].get(method, {})
    unseen = final.get("unseen")
    found: dict[Figure, float | None] = {
        "dice": final["dice_mean"],
        "worst_site": final["dice_worst_site"],
        "unseen": statistics.fmean(unseen.values()) if unseen else None,
        "R": None if head.get("R") is None else 100 * head["R"],
        "W": head.get("W"),
        "G": head.get("G"),
        "unseen_gain": None if head.get("U_pooled") is None else 0.0 - head["U_pooled"],
    }
    return {name: value for name, value in found.items() if value is not None}


def against_expected(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Whether results of one study, one for each seed, are what its file expects of their mean.

    Returns:
        For each expected figure `method`, `figure`, `value`, `tolerance`, `found` (None if it is not defined) and `met`.
    """
    rows = []
    for method, wanted in results[0].get("expected", {}).items():
        by_seed = [figures(result, method) for result in results]
        for name, expected in wanted.items():
            known = [found[name] for found in by_seed if name in found]
            mean = statistics.fmean(known) if known else None
            met = mean is not None and abs(mean - expected["value"]) <= expected["tolerance"]
            rows.append({"method": method, "figure": name, **expected, "found": mean, "met": met})
    return rows
