"""A card beside trained networks, under the headings of Mitchell et al. (Model Cards for Model Reporting, arXiv 1810.03993)."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from fedseg.case_rows import CaseRow, read_scores
from fedseg.report.evidence import Result, in_short, unknown
from fedseg.report.provenance import software_of
from fedseg.report.tables import load_result
from fedseg.report.words import counted

NAME = "MODEL_CARD.md"


def model_card(directory: Path) -> str:
    """The card of a finished simulation's networks, as Markdown.

    Args:
        directory: the result directory.

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
        f"# Model card: {result['name']}",
        "## Model details",
        f"- Network: {model['name']} {model['preset'] or ''}".rstrip(),
        f"- Segments {', '.join(labels)} in {experiment['task']['modality'].upper()} volumes",
        f"- Trained with: {software_of(directory)}",
        f"- {counted(result['rounds'], 'round')}, seed {result['seed']}, {training['optimizer']}, "
        f"patches of {' x '.join(map(str, training['patch_size']))} voxels",
        f"- Experiment: SHA-256 {result['experiment_digest']}",
        "",
        _files(directory),
        "## Intended use",
        "Research on federated segmentation. Not a medical device: not for diagnosis or treatment.",
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
        "Weights can hold traces of the persons they were trained on. Clipping and noise (`[privacy]`) lower the risk; see "
        "docs/privacy.md.",
        "## Caveats and recommendations",
        "\n".join(f"- {sentence}" for sentence in unknown(result, rows)),
    ]
    return "\n".join(_spaced(parts)) + "\n"


def _spaced(parts: Sequence[str]) -> list[str]:
    """An empty line around headings."""
    lines: list[str] = []
    for part in parts:
        lines += ["", part, ""] if part.startswith("#") else [part]
    return lines[1:]


def _files(directory: Path) -> str:
    paths = sorted((directory / "models").rglob("*.safetensors"))
    lines = [f"| {path.relative_to(directory)} | {hashlib.sha256(path.read_bytes()).hexdigest()} |" for path in paths]
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
