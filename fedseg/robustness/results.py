"""Measurements as rows and views ask for them: a case's value is the mean of the networks that stand for the row there."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedseg.metrics import FAILURE_DICE, LabelScore
from fedseg.robustness.confidence import Confidence
from fedseg.robustness.measure import Scored
from fedseg.robustness.networks import Row
from fedseg.robustness.resampling import Value
from fedseg.robustness.store import Found
from fedseg.robustness.uncertainty import Doubt
from fedseg.robustness.views import View

Of = Callable[[Scored], float]


@dataclass(frozen=True)
class Results:
    """What has been measured.

    Args:
        found: everything in the store.
        keys: of the views, by name; worked out once, since files are looked at for it.
        structures: names, without the background.
    """

    found: Found
    keys: dict[str, str]
    structures: tuple[str, ...]

    def values(self, row: Row, view: View, of: Of) -> list[Value]:
        """One value for each case that could be used, in the order of the cases."""
        return [*self.by_case(row, view, of).values()]

    def by_case(self, row: Row, view: View, of: Of) -> dict[str, Value]:
        """The same by name of the case."""
        networks = [self._cases(network.sha256, view) for network in row.at(view.name)]
        return {
            case.name: Value(case.person, math.fsum(of(cases[case.name]) for cases in networks) / len(networks))
            for case in view.cases
            if networks and all(case.name in cases for cases in networks)
        }

    def confidences(self, row: Row, view: View) -> list[tuple[str, Confidence]]:
        """Persons and sums, of all the networks that stand for the row."""
        networks = [self._cases(network.sha256, view) for network in row.at(view.name)]
        return [
            (case.person, cases[case.name].confidence)
            for cases in networks
            for case in view.cases
            if case.name in cases
        ]

    def doubts(self, row: Row, view: View) -> list[tuple[str, Scored, Doubt]]:
        """Persons, scores and doubts of all cases and networks that have both."""
        return [
            (case.person, scored[case.name], doubts[case.name])
            for network in row.at(view.name)
            for scored, doubts in [
                (self._cases(network.sha256, view), self.found.doubts.get((network.sha256, self.keys[view.name]), {}))
            ]
            for case in view.cases
            if case.name in scored and case.name in doubts
        ]

    def skipped(self, views: Sequence[View]) -> dict[str, dict[str, int]]:
        """How many cases could not be used, by view and reason."""
        counts: dict[str, dict[str, int]] = {}
        for view in views:
            reasons = list(self.found.skipped.get(self.keys[view.name], {}).values())
            if reasons:
                counts[view.name] = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
        return counts

    def _cases(self, sha256: str, view: View) -> dict[str, Scored]:
        return self.found.scored.get((sha256, self.keys[view.name]), {})


def dice(scored: Scored) -> float:
    """Mean Dice of the structures."""
    return _mean([score.dice for score in scored.labels.values()])


def failed(scored: Scored) -> float:
    """1 if any structure has a Dice below 0.5, else 0."""
    return float(min(score.dice for score in scored.labels.values()) < FAILURE_DICE)


def of_structure(name: str, of: Callable[[LabelScore], float]) -> Of:
    """A structure's own."""
    return lambda scored: of(scored.labels[name])


def over_structures(of: Callable[[LabelScore], float]) -> Of:
    """Mean over structures that have it."""
    return lambda scored: _mean([of(score) for score in scored.labels.values()])


def volume_bias(score: LabelScore) -> float:
    """Predicted minus reference volume in mm³."""
    return score.volume_predicted - score.volume_reference


def volume_bias_percent(score: LabelScore) -> float:
    """In percent of the reference; NaN if the structure is not there."""
    return 100 * volume_bias(score) / score.volume_reference if score.volume_reference else math.nan


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
