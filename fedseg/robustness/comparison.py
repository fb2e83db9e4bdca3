"""Which rows differ: paired over persons, each of whom every row has segmented through every hospital's scanner."""

import itertools
from collections.abc import Sequence
from typing import Any

from fedseg.robustness.networks import Row
from fedseg.robustness.paired import paired, person_means
from fedseg.robustness.resampling import Resampling
from fedseg.robustness.results import Results, dice
from fedseg.robustness.views import View


def comparisons(
    rows: Sequence[Row], views: Sequence[View], results: Results, draws: Resampling
) -> list[dict[str, Any]]:
    """Every pair of rows, as `paired` tells of it."""
    persons = {row.name: person_means([v for view in views for v in results.values(row, view, dice)]) for row in rows}
    return paired(persons, list(itertools.combinations(persons, 2)), draws)
