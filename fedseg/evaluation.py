"""Score a model on the cases of one site, and reduce the scores to what may leave it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedseg.config import EvaluationConfig
from fedseg.device import Precision
from fedseg.inference import evaluating, predict_label
from fedseg.metrics import FAILURE_DICE, LabelScore, bootstrap_ci, join_sums, means_from_sums, score_case
from fedseg.slicing import EACH_ALONE, Slicing

__all__ = [
    "CaseScore",
    "Evaluation",
    "LabelScore",
    "bootstrap_ci",
    "evaluate",
    "join_sums",
    "means_from_sums",
]

Metric = Literal["dice", "hd95", "surface_dice"]
METRICS: tuple[Metric, ...] = ("dice", "hd95", "surface_dice")


class Case(Protocol):
    """A preprocessed case with its reference label."""

    @property
    def name(self) -> str:
        """Known at home only."""

    @property
    def person(self) -> str:
        """Whose volume it is; known at home only."""

    @property
    def image(self) -> NDArray[np.float32]:
        """`(C, D, H, W)`."""

    @property
    def label(self) -> Any:
        """`(D, H, W)`, label values; not None."""

    @property
    def spacing(self) -> Sequence[float]:
        """Voxel size `(D, H, W)` in mm."""


@dataclass(frozen=True)
class CaseScore:
    """The scores of one case; stays at home."""

    name: str
    """Name of the case."""
    person: str
    """Whose volume it is."""
    labels: dict[str, LabelScore]
    """By structure."""

    @property
    def dice(self) -> float:
        """Mean Dice of the structures."""
        return math.fsum(score.dice for score in self.labels.values()) / len(self.labels)

    @property
    def failed(self) -> bool:
        """Whether any structure has a Dice below 0.5."""
        return any(score.dice < FAILURE_DICE for score in self.labels.values())


@dataclass(frozen=True)
class Evaluation:
    """The scores of several cases; means of nothing are NaN."""

    cases: tuple[CaseScore, ...]
    """In the order in which they were scored."""

    def dice_mean(self) -> float:
        """Mean Dice, unweighted over cases and structures."""
        return self.mean("dice")

    def hd95_mean(self) -> float:
        """Mean HD95 in mm, likewise; NaN without surface metrics."""
        return self.mean("hd95")

    def surface_dice_mean(self) -> float:
        """Mean surface Dice, likewise; NaN without surface metrics."""
        return self.mean("surface_dice")

    def mean(self, metric: Metric) -> float:
        """Mean of a metric over cases and structures, leaving out NaN."""
        return _mean(getattr(score, metric) for case in self.cases for score in case.labels.values())

    def label_means(self, metric: Metric = "dice") -> dict[str, float]:
        """Mean of a metric over cases, by structure."""
        names = dict.fromkeys(name for case in self.cases for name in case.labels)
        return {name: _mean(getattr(case.labels[name], metric) for case in self.cases) for name in names}

    def p10(self) -> float:
        """Tenth percentile over cases of their mean Dice: what the worst tenth gets at most."""
        return float(np.quantile([case.dice for case in self.cases], 0.1)) if self.cases else math.nan

    def worst(self) -> CaseScore | None:
        """The case with the lowest mean Dice; the first of equals."""
        return min(self.cases, key=lambda case: case.dice, default=None)

    def failure_rate(self) -> float:
        """Share of cases in which any structure has a Dice below 0.5."""
        return _mean(float(case.failed) for case in self.cases)

    def by_person(self) -> dict[str, list[float]]:
        """Each person's case Dice, for `bootstrap_ci`."""
        persons: dict[str, list[float]] = {}
        for case in self.cases:
            persons.setdefault(case.person, []).append(case.dice)
        return persons

    def sums(self) -> dict[str, float]:
        """What may leave the hospital: sums and counts over cases, to be added up by `join_sums`.

        No sums of squares or extremes: with few cases they give single values away. A sum over one case is that case's
        value, so whoever sends sums asks for a minimum of cases first.

        Returns:
            `cases`, `failures`, and for each metric and structure `<metric>/<label>/sum` and `<metric>/<label>/count`;
            the surface metrics only if they were computed.
        """
        sums = {"cases": float(len(self.cases)), "failures": float(sum(case.failed for case in self.cases))}
        for metric in METRICS:
            for name in self.label_means():
                values = [getattr(case.labels[name], metric) for case in self.cases]
                known = [value for value in values if not math.isnan(value)]
                if known:
                    sums[f"{metric}/{name}/sum"] = math.fsum(known)
                    sums[f"{metric}/{name}/count"] = float(len(known))
        return sums


def evaluate(
    model: nn.Module,
    cases: Iterable[Case],
    labels: Mapping[str, int],
    config: EvaluationConfig,
    patch_size: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    surface: bool | None = None,
    batch_size: int = 1,
    slicing: Slicing = EACH_ALONE,
    on_case: Callable[[int, CaseScore], None] | None = None,
) -> Evaluation:
    """Segment every case and score it on its own (preprocessed) grid, one at a time.

    Args:
        model: moved to `device`; its training and evaluation modes are as before afterwards.
        cases: with labels; an iterable that makes them on the fly keeps memory low.
        labels: name to value; the background is left out.
        config: overlap of windows, tolerance of the surface Dice, whether to compute surface metrics.
        patch_size: window in voxels `(D, H, W)`.
        device: where to compute.
        precision: autocast type of the network.
        surface: overrides `config.surface_metrics`.
        batch_size: windows per forward pass.
        slicing: neighbouring slices that the network sees as channels.
        on_case: called with the number of cases so far (1, 2, ...) and the case's scores.
    """
    model.to(device)
    with_surface = config.surface_metrics if surface is None else surface
    scores: list[CaseScore] = []
    with evaluating(model):
        for case in cases:
            if case.label is None:
                raise ValueError(f"{case.name} has no label and cannot be scored")
            prediction = predict_label(
                model,
                case.image,
                patch_size,
                overlap=config.overlap,
                device=device,
                precision=precision,
                batch_size=batch_size,
                slicing=slicing,
            )
            found = score_case(
                prediction,
                case.label,
                case.spacing,
                labels,
                surface=with_surface,
                tolerance=config.surface_tolerance,
            )
            scores.append(CaseScore(name=case.name, person=case.person, labels=found))
            if on_case is not None:
                on_case(len(scores), scores[-1])
    return Evaluation(tuple(scores))


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
