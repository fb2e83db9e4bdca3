"""How much a clean model loses under every simulated effect: the measure of severities.

The aim for the five severities of an effect is a loss of about 1, 3, 7, 15 and 30 points of Dice (0.01). Annotators spoil no
image; theirs is the agreement of their labels with the ones they started from.
"""

import csv
import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from fedseg.config import Experiment
from fedseg.data.cohort import Case, Cohort, read_cohort
from fedseg.data.preprocess import PreparedCase, prepare_case
from fedseg.data.shift.catalogue import EFFECTS, HABITS, SEVERITIES
from fedseg.data.shift.profiles import Annotator, Habit, ScannerProfile, Shift, single_effect
from fedseg.errors import CaseError, DataError
from fedseg.evaluation import evaluate
from fedseg.federated.checkpoint import write_durably
from fedseg.layout import Layout
from fedseg.metrics import score_case

AIM = (1.0, 3.0, 7.0, 15.0, 30.0)
"""Points of Dice that a clean model should lose at severity 1 to 5."""


@dataclass(frozen=True)
class Measured:
    """One effect at one severity."""

    name: str
    severity: int
    """0 for a whole scanner profile."""
    strength: float
    """In the effect's own unit; NaN for a profile."""
    dice: float
    """Mean over cases and structures: of the model, or of an annotator with the labels as they were."""
    lost: float
    """Points of Dice against the clean images, or against full agreement."""


def unseen_cases(run: Path) -> Cohort:
    """The cases that a result directory's sites never saw.

    Raises:
        DataError: the directory holds no layout, or its simulation kept no cases aside.
    """
    try:
        layout = Layout.model_validate_json((run / "layout.json").read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{run}: holds no layout.json of `fedseg simulate`; name the cases with --data: {error}"
        ) from None
    if layout.test is None:
        raise DataError(f"{run}: its simulation kept no test cases aside; name some with --data")
    cohort = read_cohort(Path(layout.test.data), layout.test.person)
    return cohort if layout.test.cases is None else cohort.subset(layout.test.cases)


def calibrate(
    model: nn.Module,
    experiment: Experiment,
    cohort: Cohort,
    names: Sequence[str],
    *,
    profiles: Mapping[str, ScannerProfile] = MappingProxyType({}),
    device: torch.device | str = "cpu",
    seed: int = 0,
    on_step: Callable[[int, int], None] = lambda _done, _total: None,
) -> tuple[float, list[Measured]]:
    """Score the model on every case under each effect and severity.

    Args:
        model: trained on clean images.
        experiment: what it was trained for.
        cohort: labelled cases; those that cannot be used are left out.
        names: effects and annotators' habits.
        profiles: whole scanners, measured after these.
        device: where to compute.
        seed: of the effects.
        on_step: called with the number of finished combinations and their total.

    Returns:
        The Dice on clean images, and what was measured.

    Raises:
        DataError: no case can be used.
    """
    usable = [case for case, _ in _prepared(cohort.cases, experiment, None)]
    if not usable:
        raise DataError(f"{cohort.root}: none of {len(cohort.cases)} cases can be used")

    def dice(shift: Shift | None) -> float:
        cases = (prepared for _, prepared in _prepared(usable, experiment, shift))
        return _score(model, experiment, cases, device)

    clean = dice(None)
    total = len(names) * len(SEVERITIES) + len(profiles)
    found: list[Measured] = []
    for name, severity in itertools.product(names, SEVERITIES):
        on_step(len(found), total)
        if name in EFFECTS:
            value = dice(Shift(scanner=single_effect(name, severity), seed=seed))
            found.append(Measured(name, severity, EFFECTS[name].strengths[severity - 1], value, 100 * (clean - value)))
        else:
            value = _agreement(usable, experiment, name, severity, seed)
            found.append(Measured(name, severity, HABITS[name].strengths[severity - 1], value, 100 * (1 - value)))
    for name, profile in profiles.items():
        on_step(len(found), total)
        value = dice(Shift(scanner=profile, seed=seed))
        found.append(Measured(name, 0, math.nan, value, 100 * (clean - value)))
    on_step(total, total)
    return clean, found


def suitable(experiment: Experiment) -> list[str]:
    """Effects that fit the task's modality, and habits that fit its labels."""
    effects = [name for name, effect in EFFECTS.items() if experiment.task.modality in effect.modalities]
    several = len(experiment.task.structures) > 1
    return effects + [name for name in HABITS if several or name not in ("moved-face", "missed", "merged")]


def write_table(path: Path, clean: float, rows: Sequence[Measured]) -> None:
    """Write as CSV, the clean score first, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(field.name for field in fields(Measured))
    writer.writerow(("clean", 0, "", clean, 0.0))
    writer.writerows(astuple(row) for row in rows)
    write_durably(path, text.getvalue().encode())


def _prepared(
    cases: Sequence[Case], experiment: Experiment, shift: Shift | None
) -> Iterator[tuple[Case, PreparedCase]]:
    """One at a time, so that memory does not grow with the cohort."""
    for case in cases:
        try:
            yield case, prepare_case(case, experiment.task, experiment.data, shift)
        except CaseError:
            continue


def _score(
    model: nn.Module, experiment: Experiment, cases: Iterator[PreparedCase], device: torch.device | str
) -> float:
    return evaluate(
        model,
        cases,
        experiment.task.structures,
        experiment.evaluation,
        experiment.training.patch_size,
        device=device,
        precision=experiment.training.precision,
        surface=False,
        slicing=experiment.slicing,
    ).dice_mean()


def _agreement(cases: Sequence[Case], experiment: Experiment, habit: str, severity: int, seed: int) -> float:
    annotator = Annotator(name=habit, habits=(Habit(name=habit, severity=severity),))
    shift = Shift(annotator=annotator, seed=seed)
    values = []
    for case in cases:
        ours, theirs = (prepare_case(case, experiment.task, experiment.data, one) for one in (None, shift))
        assert ours.label is not None
        assert theirs.label is not None
        scores = score_case(theirs.label, ours.label, ours.spacing, experiment.task.structures, surface=False)
        values += [score.dice for score in scores.values() if not math.isnan(score.dice)]
    return math.fsum(values) / len(values)
