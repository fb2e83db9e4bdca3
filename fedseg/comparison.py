"""The figures that compare a method with pooled and local training, over the sites and the hospitals that took no part."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Figure = Literal["dice", "worst_site", "unseen", "R", "W", "G", "unseen_gain"]

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

BASELINES = ("pooled", "local")


def compare(
    method: str, sites: Mapping[str, Mapping[str, Any]], unseen: Mapping[str, Mapping[str, Any]]
) -> dict[Figure, Floats]:
    """A method's figures; those whose baseline or whose hospitals are missing are not among them.

    Args:
        method: a federated method, `pooled` or `local`; the last two have the first three figures only.
        sites: by method, the mean Dice of each site: numbers, or arrays of one shape, such as resampled means.
        unseen: the same of the hospitals that took no part.

    Returns:
        `dice` (mean over sites), `worst_site` and `unseen` (mean) as Dice; `R`, the mean of the sites in percent of the pooled
        model's; in Dice points (0.01) `W`, the largest deficit of a site against pooled, `G`, the smallest gain of a site over
        its own local model, and `unseen_gain`, what unseen hospitals have more than with the pooled model.
    """
    own, others = sites[method], unseen.get(method)
    figures: dict[Figure, Floats] = {"dice": _mean(own), "worst_site": np.min([*own.values()], axis=0)}
    if others:
        figures["unseen"] = _mean(others)
    if method in BASELINES:
        return figures
    if pooled := sites.get("pooled"):
        figures["R"] = 100 * _mean(own) / _mean(pooled)
        figures["W"] = 100 * np.max([pooled[site] - own[site] for site in own], axis=0)
    if local := sites.get("local"):
        figures["G"] = 100 * np.min([own[site] - local[site] for site in own], axis=0)
    if others and unseen.get("pooled"):
        figures["unseen_gain"] = 100 * (_mean(others) - _mean(unseen["pooled"]))
    return figures


def figures_of(result: Mapping[str, Any], method: str) -> dict[Figure, float]:
    """The same from what `result.json` holds."""
    final = {name: result["final"][name] for name in (method, *BASELINES) if name in result["final"]}
    sites = {name: found["sites"] for name, found in final.items()}
    found = compare(method, sites, {name: found.get("unseen", {}) for name, found in final.items()})
    return {name: float(value) for name, value in found.items()}


def _mean(hospitals: Mapping[str, Any]) -> Floats:
    return np.asarray(np.mean([*hospitals.values()], axis=0))
