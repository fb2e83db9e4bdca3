"""Robustness of a finished simulation, or of one network: what to measure, and what `robustness.json` says of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedseg.config import Experiment
from fedseg.data.cohort import Cohort
from fedseg.data.shift.catalogue import EFFECTS, SEVERITIES
from fedseg.errors import ConfigError, DataError, StoreError
from fedseg.federated.checkpoint import write_durably
from fedseg.layout import Layout
from fedseg.model_file import read_model_file
from fedseg.robustness.calibration import calibration
from fedseg.robustness.comparison import comparisons
from fedseg.robustness.degradation import grid
from fedseg.robustness.hospitals import cross_site, leave_one_out, rows_in_short
from fedseg.robustness.networks import Network, Row, rows_of
from fedseg.robustness.resampling import Resampling
from fedseg.robustness.results import Results
from fedseg.robustness.views import CLEAN, View, clean_view, effect_views, hospital_views
from fedseg.robustness.work import Progress, Wish, fulfil
from fedseg.scenario import Scenario

Part = Literal["cross-site", "grid", "calibration"]
PARTS: tuple[Part, ...] = ("cross-site", "grid", "calibration")
FORMAT = 1
NAME = "robustness.json"


@dataclass(frozen=True)
class Question:
    """What is asked."""

    parts: tuple[Part, ...] = PARTS
    effects: tuple[str, ...] | None = None
    """None: all that fit the task's modality."""
    severities: tuple[int, ...] = SEVERITIES
    methods: tuple[str, ...] | None = None
    """Federated methods; None: all."""
    surface: bool = False
    """HD95 and surface Dice too."""


@dataclass(frozen=True)
class Machine:
    """On what it is measured; results do not depend on the number of workers."""

    workers: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class _Subject:
    """Networks, and what they are measured on."""

    experiment: Experiment
    rows: list[Row]
    hospitals: list[View]
    clean: View

    def chosen(self) -> list[Row]:
        """Rows of the severity grid and of the calibration: every method, and pooled."""
        return [row for row in self.rows if row.kind in ("method", "pooled")] or self.rows


def evaluate_run(
    run: Path, question: Question, machine: Machine, *, progress: Progress = lambda _done, _total: None
) -> dict[str, Any]:
    """Measure the networks of a simulation; `robustness.sqlite` and `robustness.json` go into its directory.

    Args:
        run: a finished simulation.
        question: what to measure.
        machine: workers and device.
        progress: called with the number of finished cases, and the total of what was missing.

    Returns:
        What `robustness.json` holds.

    Raises:
        StoreError: the directory holds no finished simulation.
        ConfigError: there is no such method or effect.
        ModelError: a model file is missing.
    """
    try:
        scenario = Scenario.model_validate_json((run / "scenario.json").read_bytes())
        layout = Layout.model_validate_json((run / "layout.json").read_bytes())
        (run / "result.json").read_bytes()
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{run}: holds no finished simulation of this version; `fedseg simulate` makes one: {error}"
        ) from None
    experiment = scenario.experiment
    rows = rows_of(run, scenario, layout, question.methods)
    subject = _Subject(experiment, rows, hospital_views(layout, experiment), clean_view(layout, experiment))
    return _evaluate(subject, question, machine, run, progress)


def evaluate_model(
    model: Path,
    cohort: Cohort,
    output: Path,
    question: Question,
    machine: Machine,
    *,
    progress: Progress = lambda _done, _total: None,
) -> dict[str, Any]:
    """Measure one network on labelled cases, as they are and under effects.

    Args:
        model: a model file.
        cohort: the cases.
        output: folder for `robustness.sqlite` and `robustness.json`; made where it is missing.
        question: what to measure.
        machine: workers and device.
        progress: called with the number of finished cases, and the total of what was missing.

    Raises:
        ModelError: the file is no complete network.
        ConfigError: there is no such effect.
        DataError: no case can be used.
    """
    if question.methods is not None:
        raise ConfigError("--methods chooses among the methods of a result directory, and a model file has none")
    experiment = read_model_file(model).experiment
    output.mkdir(parents=True, exist_ok=True)
    clean = View(CLEAN, "clean", cohort.cases)
    hospital = View(cohort.root.name, "site", cohort.cases)
    subject = _Subject(experiment, [Row(model.stem, "single", (Network.at(model),), {})], [hospital], clean)
    return _evaluate(subject, question, machine, output, progress)


def suitable(experiment: Experiment, effects: Sequence[str] | None) -> tuple[str, ...]:
    """The effects that are asked for, or all that fit the task.

    Raises:
        ConfigError: there is none of that name, or it is for another modality.
    """
    modality = experiment.task.modality
    fitting = [name for name, effect in EFFECTS.items() if modality in effect.modalities]
    if strangers := [name for name in effects or () if name not in fitting]:
        raise ConfigError(f"no effect {strangers[0]!r} for {modality} images; there are {', '.join(fitting)}")
    return tuple(fitting if effects is None else dict.fromkeys(effects))


def _evaluate(
    subject: _Subject, question: Question, machine: Machine, output: Path, progress: Progress
) -> dict[str, Any]:
    shifted = []
    if "grid" in question.parts:
        shifted = effect_views(subject.clean, suitable(subject.experiment, question.effects), question.severities)
    found = fulfil(
        _wishes(subject, question, shifted),
        output / "robustness.sqlite",
        workers=machine.workers,
        device=machine.device,
        surface=question.surface,
        progress=progress,
    )
    views = [*subject.hospitals, subject.clean, *shifted]
    results = Results(found, {view.name: view.key for view in views}, tuple(subject.experiment.task.structures))
    document = _document(subject, question, shifted, results)
    document = _with_earlier_parts(output / NAME, document)
    write_durably(output / NAME, (json.dumps(document, indent=1) + "\n").encode())
    return document


def _wishes(subject: _Subject, question: Question, shifted: Sequence[View]) -> list[Wish]:
    wishes = []
    if "cross-site" in question.parts:
        wishes += [Wish(view, _networks(subject.rows, view)) for view in subject.hospitals]
    if "calibration" in question.parts:
        wishes += [Wish(view, _networks(subject.chosen(), view), doubt=True) for view in subject.hospitals]
    if "grid" in question.parts:
        wishes += [Wish(view, _networks(subject.chosen(), view)) for view in (subject.clean, *shifted)]
    return wishes


def _networks(rows: Sequence[Row], view: View) -> tuple[Network, ...]:
    return tuple(dict.fromkeys(network for row in rows for network in row.at(view.name)))


def _document(subject: _Subject, question: Question, shifted: Sequence[View], results: Results) -> dict[str, Any]:
    rows, hospitals, clean = subject.rows, subject.hospitals, subject.clean
    persons = {case.person for view in (*hospitals, clean) for case in view.cases}
    draws = Resampling(sorted(persons))
    document: dict[str, Any] = {
        "format": FORMAT,
        "name": subject.experiment.name,
        "structures": list(results.structures),
        "cases": len(clean.cases),
        "persons": len(persons),
        "networks": {
            row.name: sorted(network.sha256 for network in {*row.everywhere, *row.at_home.values()}) for row in rows
        },
        "hospitals": {
            view.name: {
                "takes_part": view.kind == "site",
                "scanner": view.shift and view.shift.scanner and view.shift.scanner.name,
            }
            for view in hospitals
        },
        "skipped": results.skipped([*hospitals, clean, *shifted]),
    }
    if "cross-site" in question.parts:
        compared = [row for row in rows if row.kind in ("method", "pooled", "local")]
        sites = [view for view in hospitals if view.kind == "site"]
        if not any(results.values(row, view, lambda _: 0.0) for row in rows for view in hospitals):
            raise DataError(f"none of the {len(clean.cases)} cases can be used: {document['skipped']}")
        document["cross_site"] = {
            "dice": cross_site(rows, hospitals, results, draws),
            "rows": rows_in_short(rows, hospitals, results, draws),
            "leave_one_out": leave_one_out(rows, hospitals, results, draws),
            "comparisons": comparisons(compared, sites, results, draws),
        }
    if "calibration" in question.parts:
        document["calibration"] = calibration(subject.chosen(), hospitals, results, draws)
    if "grid" in question.parts:
        document["grid"] = grid(subject.chosen(), clean, shifted, results, draws)
    return document


def _with_earlier_parts(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Parts that were not asked for now stay, if they are of the same networks."""
    try:
        earlier = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return document
    if not isinstance(earlier, dict) or any(earlier.get(key) != document[key] for key in ("format", "networks")):
        return document
    kept = {key: earlier[key] for key in ("cross_site", "calibration", "grid") if key in earlier}
    return kept | document
