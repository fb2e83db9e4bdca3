"""Calibration of networks at hospitals, and whether their uncertainty finds the cases in which they fail."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from fedseg.robustness.confidence import Confidence, expected_error, stacked
from fedseg.robustness.measure import Scored
from fedseg.robustness.networks import Row
from fedseg.robustness.resampling import Floats, Resampling, estimate
from fedseg.robustness.results import Results, dice, failed
from fedseg.robustness.uncertainty import Doubt
from fedseg.robustness.views import View


def calibration(rows: Sequence[Row], views: Sequence[View], results: Results, draws: Resampling) -> dict[str, Any]:
    """By row: ECE and Brier score over all hospitals and at each, a reliability diagram, and what uncertainty is worth."""
    found = {}
    for row in rows:
        cases = {view.name: results.confidences(row, view) for view in views}
        joined = [case for of_view in cases.values() for case in of_view]
        if not joined:
            continue
        doubts = [case for view in views for case in results.doubts(row, view)]
        found[row.name] = {
            "ece": estimate(ece(joined, draws)),
            "brier": estimate(brier(joined, draws)),
            "reliability": reliability([case for _, case in joined]),
            "hospitals": {
                name: {"ece": estimate(ece(of_view, draws)), "brier": estimate(brier(of_view, draws))}
                for name, of_view in cases.items()
                if of_view
            },
            "uncertainty": _worth(doubts, draws),
        }
    return found


def ece(cases: Sequence[tuple[str, Confidence]], draws: Resampling) -> Floats:
    """Expected calibration error of the rings' voxels together."""
    if not cases:
        return np.full(len(draws.weights_NP), math.nan)
    sums_N3B = draws.sums([person for person, _ in cases], stacked([case for _, case in cases]))
    return expected_error(sums_N3B[:, 0], sums_N3B[:, 1], sums_N3B[:, 2])


def brier(cases: Sequence[tuple[str, Confidence]], draws: Resampling) -> Floats:
    """Brier score of the rings' voxels together, in [0, 2]."""
    persons = [person for person, _ in cases]
    above, below = np.array([(case.brier, sum(case.voxels)) for _, case in cases]).T
    return draws.ratio(persons, above, below)


def reliability(cases: Sequence[Confidence]) -> dict[str, list[float | None]]:
    """By bin of confidence: mean confidence, share of right voxels, and number of voxels."""
    voxels_B, confidence_B, correct_B = stacked(cases).sum(axis=0)

    def means(sums_B: Floats) -> list[float | None]:
        return [float(above / below) if below else None for above, below in zip(sums_B, voxels_B, strict=True)]

    return {"confidence": means(confidence_B), "accuracy": means(correct_B), "voxels": voxels_B.tolist()}


def auroc(failures: Sequence[bool], uncertainty: Sequence[float], weights_NC: Floats) -> Floats:
    """Chance that a failed case is more uncertain than one that has not failed, equal ones counting half.

    Args:
        failures: whether each case failed.
        uncertainty: of each case.
        weights_NC: how often each case counts, in each draw.

    Returns:
        `(N,)`; NaN where a draw lacks either kind of case.
    """
    bad, values = np.array(failures, dtype=bool), np.array(uncertainty)
    above = (values[bad][:, None] > values[~bad]) + 0.5 * (values[bad][:, None] == values[~bad])
    wins_N = ((weights_NC[:, bad] @ above) * weights_NC[:, ~bad]).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(wins_N / (weights_NC[:, bad].sum(axis=1) * weights_NC[:, ~bad].sum(axis=1)))


def _worth(doubts: Sequence[tuple[str, Scored, Doubt]], draws: Resampling) -> dict[str, Any]:
    """AUROC of failures and rank correlation with the error, of each kind of uncertainty that there is."""
    failures = [bool(failed(scored)) for _, scored, _ in doubts]
    errors = [1 - dice(scored) for _, scored, _ in doubts]
    kinds: dict[str, list[float]] = {"augmented": [doubt.augmented for _, _, doubt in doubts]}
    heads = [doubt.heads for _, _, doubt in doubts if doubt.heads is not None]
    if heads and len(heads) == len(doubts):
        kinds["heads"] = heads
    persons = [person for person, _, _ in doubts]
    weights_NC = draws.case_weights(persons)
    return {
        name: {
            "cases": len(values),
            "failures": sum(failures),
            "mean": float(np.mean(values)),
            "auroc": estimate(auroc(failures, values, weights_NC)),
            "spearman": _or_none(stats.spearmanr(values, errors).statistic if len(set(values)) > 1 else math.nan),
        }
        for name, values in kinds.items()
        if values
    }


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
