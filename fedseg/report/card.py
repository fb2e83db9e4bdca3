"""A card beside trained networks, under the headings of Mitchell et al. (Model Cards for Model Reporting, arXiv 1810.03993)."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedseg.case_rows import CaseRow, read_scores
from fedseg.federated.checkpoint import write_durably
from fedseg.report.evidence import Result, in_short, unknown
from fedseg.report.provenance import UNKNOWN, software_of
from fedseg.report.tables import load_result
from fedseg.words import counted

NAME = "MODEL_CARD.md"


HEADING = "# Model card: "
USE = "Research on federated segmentation. Not a medical device: not for diagnosis or treatment."
TRACES = (
    "Weights can hold traces of the persons they were trained on. Clipping and noise (`[privacy]`) lower the risk; see "
    "docs/privacy.md."
)


@dataclass(frozen=True)
class Exported:
    """An inference graph, and the model file that it was made of."""

    graph: Path
    model: Path


def write_exported_card(exported: Exported) -> Path | None:
    """Write the card of an exported network beside it.

    Returns:
        The card; None if another text lies in its place, which stays as it is.

    Raises:
        ModelError: the model file is damaged.
        StoreError: the result directory in which it lies is.
    """
    path = exported.graph.parent / NAME
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(HEADING):
        return None
    directory = _run_of(exported.model)
    finished = directory is not None and (directory / "result.json").exists()
    text = model_card(directory, exported) if directory is not None and finished else _plain_card(exported, directory)
    write_durably(path, text.encode())
    return path


def model_card(directory: Path, exported: Exported | None = None) -> str:
    """The card of a finished simulation's networks, as Markdown.

    Args:
        directory: the result directory.
        exported: the one network that it is to be about, elsewhere; absent: all in `models/`.

    Raises:
        StoreError: it holds no finished simulation.
    """
    result, scores = load_result(directory), directory / "scores.csv"
    rows = read_scores(scores) if scores.exists() else []
    experiment = json.loads((directory / "scenario.json").read_text(encoding="utf-8"))["experiment"]
    labels = [name for name in experiment["task"]["labels"] if name != "background"]
    model, training = result["model"], experiment["training"]
    cases = sum(counts["training_cases"] for counts in result["sites"].values())
    parts = [
        f"{HEADING}{result['name']}",
        "## Model details",
        f"- Network: {model['name']} {model['preset'] or ''}".rstrip(),
        f"- Segments {', '.join(labels)} in {experiment['task']['modality'].upper()} volumes",
        f"- Trained with: {software_of(directory)}",
        f"- {counted(result['rounds'], 'round')}, seed {result['seed']}, {training['optimizer']}, "
        f"patches of {' x '.join(map(str, training['patch_size']))} voxels",
        f"- Experiment: SHA-256 {result['experiment_digest']}",
        "",
        _files(directory) if exported is None else _graph(exported, directory),
        "## Intended use",
        USE,
        "## Factors",
        _factors(result),
        "## Metrics",
        "Dice by structure, in [0, 1], unweighted over cases, structures and hospitals; 95 % intervals by drawing persons with "
        "replacement.",
        "## Evaluation data",
        _tested(result, rows),
        "## Training data",
        f"{counted(cases, 'case')} at {counted(len(result['sites']), 'hospital')}; no volume left its hospital but for the "
        "pooled yardstick of this simulation.",
        "## Quantitative analyses",
        _scores(result),
        "\n".join(f"- {sentence}" for sentence in in_short(result, rows)),
        "## Ethical considerations",
        TRACES,
        "## Caveats and recommendations",
        "\n".join(f"- {sentence}" for sentence in unknown(result, rows)),
    ]
    return "\n".join(_spaced(parts)) + "\n"


def _plain_card(exported: Exported, directory: Path | None) -> str:
    """What the model file alone tells, and the store of the run directory that it lies in."""
    from fedseg.model_file import read_model_file

    file = read_model_file(exported.model)
    experiment = file.experiment
    parts = [
        f"{HEADING}{experiment.name}",
        "## Model details",
        f"- Network: {experiment.model.name} {experiment.model.preset or ''}".rstrip(),
        f"- Segments {', '.join(experiment.task.structures)} in {experiment.task.modality.upper()} volumes",
        f"- Trained with: {UNKNOWN if directory is None else software_of(directory)}",
        f"- Run {file.origin}: {counted(experiment.federation.rounds, 'round')}, seed {experiment.seed}, "
        f"{experiment.training.optimizer}, patches of {' x '.join(map(str, experiment.training.patch_size))} voxels",
        f"- Experiment: SHA-256 {experiment.digest()}",
        "",
        _graph(exported, directory),
        "## Intended use",
        USE,
        "## Factors",
        "The model file does not tell which scanners and annotators it was trained on.",
        "## Evaluation data",
        "None that the model file knows of: it holds no scores. `fedseg evaluate` makes some.",
        "## Training data",
        "The model file tells neither how many cases nor from where.",
        "## Ethical considerations",
        TRACES,
        "## Caveats and recommendations",
        "Before any use, score it on images like those that it is for. Nobody has tried these networks on patients.",
    ]
    return "\n".join(_spaced(parts)) + "\n"


def _run_of(model: Path) -> Path | None:
    """The run directory in whose `models` folder a file lies."""
    for folder in model.resolve().parents:
        if folder.name == "models" and (folder.parent / "store.sqlite").exists():
            return folder.parent
    return None


def _spaced(parts: Sequence[str]) -> list[str]:
    """An empty line around headings."""
    lines: list[str] = []
    for part in parts:
        lines += ["", part, ""] if part.startswith("#") else [part]
    return lines[1:]


def _files(directory: Path) -> str:
    paths = sorted((directory / "models").rglob("*.safetensors"))
    return _hashes((str(path.relative_to(directory)), path) for path in paths)


def _graph(exported: Exported, directory: Path | None) -> str:
    """The graph, and the file that it was made of as it is called in its run."""
    model = exported.model.resolve()
    name = model.name if directory is None else str(model.relative_to(directory))
    return _hashes([(exported.graph.name, exported.graph), (f"made of {name}", exported.model)])


def _hashes(files: Iterable[tuple[str, Path]]) -> str:
    lines = [f"| {name} | {hashlib.sha256(path.read_bytes()).hexdigest()} |" for name, path in files]
    return "\n".join(["| file | SHA-256 |", "| --- | --- |", *lines])


def _tested(result: Result, rows: Sequence[CaseRow]) -> str:
    count = f"{counted(len({row.person for row in rows}), 'person')}: " if rows else ""
    return f"{count}{result['test']}."


def _factors(result: Result) -> str:
    hospitals = result.get("hospitals", {})
    if not hospitals:
        return "Hospitals differ in their patients; nothing else about them was varied."
    lines = []
    for name, about in hospitals.items():
        part = "" if name in result["sites"] else ", takes no part"
        annotator = f", annotator {about['annotator']}" if about.get("annotator") else ""
        lines.append(f"- {name}: {about.get('scanner') or 'scanner as the data are'}{annotator}{part}")
    return "\n".join(lines)


def _scores(result: Result) -> str:
    sites = list(result["sites"])
    head = ["method", "Dice", "95 % interval", *sites]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for method in [*result["headline"], *(name for name in ("pooled", "local") if name in result["final"])]:
        final = result["final"][method]
        cells = [method, f"{final['dice_mean']:.3f}", "{:.3f} to {:.3f}".format(*final["dice_ci95"])]
        lines.append("| " + " | ".join([*cells, *(f"{final['sites'][site]:.3f}" for site in sites)]) + " |")
    return "\n".join(lines) + "\n"
