"""The cross-site matrix, and what it says of each row: worst site, fairness, unseen hospitals, failures, volumes.

Jain's index (1984, DEC-TR-301) of K sites' Dice is (sum of x)² / (K * sum of x²): 1 if all are equal, 1/K if one has everything.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedseg.robustness.networks import Row
from fedseg.robustness.resampling import Floats, Resampling, Value, estimate
from fedseg.robustness.results import (
    Results,
    dice,
    failed,
    of_structure,
    over_structures,
    volume_bias,
    volume_bias_percent,
)
from fedseg.robustness.views import View


def cross_site(rows: Sequence[Row], views: Sequence[View], results: Results, draws: Resampling) -> dict[str, Any]:
    """Every row's Dice at every hospital, with intervals; what a row says nothing about is left out."""
    matrix = {}
    for row in rows:
        cells = {view.name: results.values(row, view, dice) for view in views}
        matrix[row.name] = {name: estimate(draws.mean(values)) for name, values in cells.items() if values}
    return matrix


def rows_in_short(rows: Sequence[Row], views: Sequence[View], results: Results, draws: Resampling) -> dict[str, Any]:
    """What each row's cells have in common."""
    return {row.name: _in_short(row, views, results, draws) for row in rows}


def leave_one_out(rows: Sequence[Row], views: Sequence[View], results: Results, draws: Resampling) -> dict[str, Any]:
    """By site: the Dice without it, and what being left out costs it against each row that it took part in, in points."""
    left_out = next((row for row in rows if row.kind == "leave-one-out"), None)
    if left_out is None:
        return {}
    sites = [view for view in views if view.kind == "site"]
    without = {view.name: draws.mean(results.values(left_out, view, dice)) for view in sites}
    drops = {
        row.name: {
            view.name: 100 * (draws.mean(results.values(row, view, dice)) - without[view.name]) for view in sites
        }
        for row in rows
        if row.kind in ("method", "pooled")
    }
    return {
        "dice": {name: estimate(values) for name, values in without.items()},
        "drop": {
            name: {site: estimate(drop) for site, drop in by_site.items()} | {"mean": estimate(_mean(by_site.values()))}
            for name, by_site in drops.items()
        },
    }


def site_means(row: Row, views: Sequence[View], results: Results, draws: Resampling) -> Floats:
    """Dice of each view: `(views, draws + 1)`."""
    return np.array([draws.mean(results.values(row, view, dice)) for view in views])


def jain(values: Floats) -> Floats:
    """Jain's index over the first axis."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(values.sum(axis=0) ** 2 / (len(values) * (values**2).sum(axis=0)))


def _in_short(row: Row, views: Sequence[View], results: Results, draws: Resampling) -> dict[str, Any]:
    sites = [view for view in views if view.kind == "site" and row.at(view.name)]
    unseen = [view for view in views if view.kind == "unseen" and row.at(view.name)]
    by_site = site_means(row, sites, results, draws)
    average = _mean(by_site)
    with np.errstate(invalid="ignore", divide="ignore"):
        short: dict[str, Any] = {
            "kind": row.kind,
            "dice": estimate(average),
            "worst_site": sites[int(np.nanargmin(by_site[:, 0]))].name if np.isfinite(by_site[:, 0]).any() else None,
            "worst_site_dice": estimate(by_site.min(axis=0)),
            "p10": estimate(draws.quantile(_all(row, sites, results, dice), 0.1)),
            "failure_rate": estimate(draws.mean(_all(row, sites, results, failed))),
            "jain": estimate(jain(by_site)),
            "worst_to_best": estimate(by_site.min(axis=0) / by_site.max(axis=0)),
            "site_sd": estimate(by_site.std(axis=0, ddof=1)) if len(sites) > 1 else {"value": None, "ci95": None},
        }
    if unseen:
        elsewhere = _mean(site_means(row, unseen, results, draws))
        short |= {"unseen_dice": estimate(elsewhere), "gap": estimate(100 * (average - elsewhere))}
        short["unseen_failure_rate"] = estimate(draws.mean(_all(row, unseen, results, failed)))
    surface = {
        name: draws.mean(_all(row, sites, results, over_structures(of)))
        for name, of in (("hd95_mm", lambda score: score.hd95), ("surface_dice", lambda score: score.surface_dice))
    }
    short |= {name: estimate(values) for name, values in surface.items() if np.isfinite(values[0])}
    return short | {"volume": _volume(row, sites, results, draws)}


def _volume(row: Row, sites: Sequence[View], results: Results, draws: Resampling) -> dict[str, Any]:
    """Errors without sign and biases with it, by structure, over all sites' cases."""
    measures = {
        "error_mm3": lambda score: abs(volume_bias(score)),
        "error_percent": lambda score: abs(volume_bias_percent(score)),
        "bias_mm3": volume_bias,
        "bias_percent": volume_bias_percent,
    }
    return {
        structure: {
            name: estimate(draws.mean(_all(row, sites, results, of_structure(structure, of))))
            for name, of in measures.items()
        }
        for structure in results.structures
    }


def _all(row: Row, views: Sequence[View], results: Results, of: Any) -> list[Value]:
    return [value for view in views for value in results.values(row, view, of)]


def _mean(parts: Any) -> Floats:
    """Over views, unweighted; without a view of which nobody was drawn."""
    stacked = np.array(list(parts))
    known = np.isfinite(stacked)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(known, stacked, 0).sum(axis=0) / known.sum(axis=0))
