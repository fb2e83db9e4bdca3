"""Which rows differ: paired over persons, each of whom every row has segmented through every hospital's scanner."""

import itertools
from collections.abc import Sequence
from typing import Any

from fedseg.robustness.networks import Row
from fedseg.robustness.paired import Cases, paired
from fedseg.robustness.resampling import Resampling
from fedseg.robustness.results import Results, dice
from fedseg.robustness.views import View


def comparisons(
    rows: Sequence[Row], views: Sequence[View], results: Results, draws: Resampling
) -> list[dict[str, Any]]:
    """Every pair of rows, as `paired` tells of it."""
    cases: dict[str, Cases] = {
        row.name: {
            (view.name, case): value for view in views for case, value in results.by_case(row, view, dice).items()
        }
        for row in rows
    }
    return paired(cases, list(itertools.combinations(cases, 2)), draws)
