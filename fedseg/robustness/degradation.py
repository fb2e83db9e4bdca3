"""What simulated shifts cost: Dice by effect and severity, and errors relative to the pooled network's.

With D(c, s) the mean Dice under effect c at severity s, and a bar for the reference, as Hendrycks and Dietterich 2019
(arXiv:1903.12261) do for classification:

    CE_c          = sum_s (1 - D(c, s)) / sum_s (1 - D_ref(c, s))
    relative CE_c = sum_s (D_clean - D(c, s)) / sum_s (D_ref_clean - D_ref(c, s))

and mCE their mean over effects: below 1, a network is better, or loses less, than the reference. The mean degradation is
the mean of D_clean - D(c, s); the weighted one counts severity s with (2/3)^s, since slight shifts are the common ones
(Boone et al. 2023, doi:10.1016/j.neuroimage.2023.120289). The relative CE is of those effects only that cost the reference
a Dice point in the mean; else one that costs nobody anything would decide.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from fedseg.robustness.calibration import ece
from fedseg.robustness.networks import Row
from fedseg.robustness.resampling import Floats, Resampling, estimate
from fedseg.robustness.results import Results, dice
from fedseg.robustness.views import View

MEASURABLE = 0.01
"""Dice that the reference must lose in the mean over severities, or the relative error would be a quotient of noise."""
ALPHA = 2 / 3


def grid(
    rows: Sequence[Row], clean: View, shifted: Sequence[View], results: Results, draws: Resampling
) -> dict[str, Any]:
    """Every row's Dice under every effect and severity, and what follows from it.

    Args:
        rows: networks; the pooled one, if there, is the reference.
        clean: the cases as they are.
        shifted: the same under effects: all combinations of some effects and some severities.
        results: what was measured.
        draws: of persons.
    """
    effects = list(dict.fromkeys(view.effect for view in shifted))
    severities = list(dict.fromkeys(view.severity for view in shifted))
    views = {(view.effect, view.severity): view for view in shifted}
    cleans = {row.name: draws.mean(results.values(row, clean, dice)) for row in rows}
    scores = {
        row.name: np.array(
            [[draws.mean(results.values(row, views[name, level], dice)) for level in severities] for name in effects]
        )
        for row in rows
    }  # each (effects, severities, draws + 1)
    reference = next((row.name for row in rows if row.kind == "pooled"), None)
    found = {}
    for row in rows:
        ours, at_best = scores[row.name], cleans[row.name]
        entry: dict[str, Any] = {
            "clean": estimate(at_best),
            "dice": {name: [estimate(one) for one in ours[number]] for number, name in enumerate(effects)},
            "ece": {
                name: [estimate(ece(results.confidences(row, views[name, level]), draws)) for level in severities]
                for name in effects
            },
        }
        entry |= {name: estimate(value) for name, value in degradations(at_best, ours, severities).items()}
        if reference is not None:
            errors = corruption_errors(at_best, ours, cleans[reference], scores[reference])
            for name, by_effect in errors.items():
                entry[name] = {effect: estimate(by_effect[number]) for number, effect in enumerate(effects)}
                entry[f"mean_{name}"] = estimate(_mean_of_known(by_effect))
        found[row.name] = entry
    return {
        "effects": effects,
        "severities": severities,
        "reference": reference,
        "rows": found,
        "ranks": ranks(
            {name: float(value[0]) for name, value in cleans.items()}, {k: v[..., 0] for k, v in scores.items()}
        ),
    }


def degradations(clean: Floats, scores_CS: Floats, severities: Sequence[int]) -> dict[str, Floats]:
    """Mean loss of Dice in points over effects and severities, plain and weighted.

    Args:
        clean: Dice without an effect.
        scores_CS: Dice by effect and severity; further axes as those of `clean`.
        severities: their numbers.
    """
    weights = np.array([ALPHA**severity for severity in severities])
    lost_C = np.tensordot(weights / weights.sum(), np.moveaxis(clean - scores_CS, 1, 0), axes=1)
    return {
        "degradation": 100 * (clean - scores_CS).mean(axis=(0, 1)),
        "weighted_degradation": 100 * lost_C.mean(axis=0),
    }


def corruption_errors(clean: Floats, scores_CS: Floats, clean_ref: Floats, scores_ref_CS: Floats) -> dict[str, Floats]:
    """CE and relative CE by effect; NaN where the reference makes no error, or loses next to nothing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        plain = (1 - scores_CS).sum(axis=1) / (1 - scores_ref_CS).sum(axis=1)
        lost_ref = (clean_ref - scores_ref_CS).sum(axis=1)
        enough = lost_ref >= MEASURABLE * scores_CS.shape[1]
        relative = (clean - scores_CS).sum(axis=1) / np.where(enough, lost_ref, math.nan)
    return {"ce": plain, "relative_ce": relative}


def ranks(clean: dict[str, float], scores_CS: dict[str, Floats]) -> dict[str, Any] | None:
    """Whether the networks' order on clean images holds under shifts; None for fewer than two.

    Returns:
        `order` on clean images, best first; `tau`: Kendall's, by severity, mean over effects; `best_stays`: share of effects and
        severities in which the best network is the best one still.
    """
    if len(clean) < 2:
        return None
    order = sorted(clean, key=lambda name: -clean[name])
    wanted = [clean[name] for name in order]
    stacked_RCS = np.array([scores_CS[name] for name in order])
    by_severity = []
    for scores_RC in np.moveaxis(stacked_RCS, 2, 0):
        taus = [float(stats.kendalltau(wanted, scores_R).statistic) for scores_R in scores_RC.T]
        by_severity.append([tau for tau in taus if math.isfinite(tau)])
    return {
        "order": order,
        "tau": [float(np.mean(values)) if values else None for values in by_severity],
        "best_stays": float(np.mean(stacked_RCS[0] >= stacked_RCS.max(axis=0))),
    }


def _mean_of_known(by_effect: Floats) -> Floats:
    """Mean over the effects for which the figure is defined for the persons as they are."""
    known = by_effect[np.isfinite(by_effect[:, 0])]
    return known.mean(axis=0) if len(known) else np.full(by_effect.shape[1:], math.nan)
