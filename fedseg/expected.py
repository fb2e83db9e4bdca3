"""What a scenario's file says should come out, and whether it did."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import FiniteFloat

from fedseg.comparison import FIGURES, Figure, figures_of
from fedseg.sections import PositiveFloat, Section


class Expected(Section):
    """A figure that was measured before."""

    value: FiniteFloat
    tolerance: PositiveFloat
    """Either way; wide enough for another seed and another machine."""


@dataclass(frozen=True)
class Outcome:
    """What was expected of a figure, and what came out."""

    method: str
    figure: Figure
    expected: Expected
    found: float | None
    """None: the figure is not defined."""

    @property
    def met(self) -> bool:
        """Is it within the tolerance?"""
        return self.found is not None and abs(self.found - self.expected.value) <= self.expected.tolerance

    @property
    def words(self) -> tuple[str, str, str, str, str]:
        """Method, figure, what was expected, what was found, and the verdict."""
        name, digits = FIGURES[self.figure]
        wanted = f"{self.expected.value:.{digits}f} ± {self.expected.tolerance:.{digits}f}"
        found = "not defined" if self.found is None else f"{self.found:.{digits}f}"
        return self.method, name, wanted, found, "as expected" if self.met else "differs"


def against_expected(results: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """Whether results of one study, one for each seed, are what its file expects of their mean."""
    outcomes = []
    for method, wanted in results[0].get("expected", {}).items():
        by_seed = [figures_of(result, method) for result in results]
        for figure, expected in wanted.items():
            known = [found[figure] for found in by_seed if figure in found]
            mean = statistics.fmean(known) if known else None
            outcomes.append(Outcome(method, figure, Expected.model_validate(expected), mean))
    return outcomes
