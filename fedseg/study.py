"""A study of one or several seeds: every figure with an interval, and which methods differ."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedseg.case_rows import CaseRow, read_scores
from fedseg.comparison import BASELINES, Figure, Floats, compare
from fedseg.errors import StoreError
from fedseg.report.tables import Result, load_study, methods_of, unseen_of
from fedseg.robustness.paired import Cases, paired
from fedseg.robustness.resampling import DRAWS, Estimate, Resampling, Value, estimate

Sites = dict[str, Floats]
"""Mean Dice by hospital: of the persons as they are, and of those drawn."""


class Study:
    """Finished simulations of one scenario with different seeds, and the scores of their test persons.

    Intervals are percentiles of the same figures of persons drawn with replacement; a person whom several seeds tested is drawn
    in all of them at once. A figure of several seeds is its mean over them, so the intervals hold for these seeds.

    Args:
        directories: of the results.
        draws: how many.

    Raises:
        StoreError: a directory holds no finished simulation, or one of another study.
    """

    def __init__(self, directories: Sequence[Path], *, draws: int = DRAWS) -> None:
        self.results = load_study(directories)
        self.methods = methods_of(self.results[0])
        self._rows = [_by_method(_scores(directory), self.methods) for directory in directories]
        persons = [row.person for of_seed in self._rows for rows in of_seed.values() for row in rows]
        self._draws = Resampling(persons, draws=draws)

    @cached_property
    def figures(self) -> dict[str, dict[Figure, Estimate]]:
        """By method, each `fedseg.comparison.Figure` where it is defined."""
        return {method: self._figures(method) for method in self.methods}

    def differences(self, references: Sequence[str]) -> dict[tuple[str, str], dict[str, Any]]:
        """What each method has more than each reference at the sites, in Dice points, paired over persons.

        Args:
            references: methods, `pooled` or `local`; those that the study lacks are left out.

        Returns:
            By method and reference, what `paired` says; Holm's correction is for all of them.
        """
        cases = {method: self._cases(method) for method in self.methods}
        wanted: dict[frozenset[str], tuple[str, str]] = {}
        for method in self.methods:
            for reference in references:
                if reference in cases and reference != method:
                    wanted.setdefault(frozenset((method, reference)), (method, reference))
        return {(*pair["rows"],): pair for pair in paired(cases, list(wanted.values()), self._draws)}

    def _figures(self, method: str) -> dict[Figure, Estimate]:
        by_seed = [self._of_seed(rows, result, method) for rows, result in zip(self._rows, self.results, strict=True)]
        shared = [name for name in by_seed[0] if all(name in figures for figures in by_seed)]
        return {name: estimate(np.mean([figures[name] for figures in by_seed], axis=0)) for name in shared}

    def _of_seed(self, rows: Mapping[str, Sequence[CaseRow]], result: Result, method: str) -> dict[Figure, Floats]:
        sites = {name: self._means(rows.get(name, ()), result["sites"]) for name in (method, *BASELINES)}
        others = {name: self._means(rows.get(name, ()), unseen_of(result)) for name in (method, "pooled")}
        return compare(method, sites, others)

    def _means(self, rows: Sequence[CaseRow], hospitals: Sequence[str]) -> Sites:
        values: dict[str, list[Value]] = {}
        for row in rows:
            values.setdefault(row.site, []).append(Value(row.person, row.dice))
        return {site: self._draws.mean(values[site]) for site in hospitals if site in values}

    def _cases(self, method: str) -> Cases:
        return {
            (str(seed), row.site, row.case, row.label): Value(row.person, row.dice)
            for seed, (of_seed, result) in enumerate(zip(self._rows, self.results, strict=True))
            for row in of_seed.get(method, ())
            if row.site in result["sites"]
        }


def _scores(directory: Path) -> list[CaseRow]:
    path = (directory.parent if directory.is_file() else directory) / "scores.csv"
    try:
        return read_scores(path)
    except FileNotFoundError:
        raise StoreError(f"{path}: no such file; `fedseg simulate` writes it with result.json") from None
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{path}: not the scores of `fedseg simulate`: {error}") from error


def _by_method(rows: Sequence[CaseRow], methods: Sequence[str]) -> dict[str, list[CaseRow]]:
    """Rows of each method; `local` is every site's own model at that site."""
    found: dict[str, list[CaseRow]] = {}
    for row in rows:
        run = "local" if row.run == f"local-{row.site}" else row.run
        if run in methods:
            found.setdefault(run, []).append(row)
    return found
