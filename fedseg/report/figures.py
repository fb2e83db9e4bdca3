"""Pictures of a finished simulation: learning curves, sites side by side, and segmentations beside their reference."""

import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from fedseg.case_rows import CaseRow, mean, read_scores
from fedseg.coordinator.state import reader
from fedseg.report.tables import Result, load_result, mean_of_seeds, unseen_of
from fedseg.words import counted

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442")
"""Okabe and Ito's, which colour-blind people can tell apart."""
POOLED, LOCAL = "#333333", "#999999"
STRUCTURES = ("#ff5d5d", "#51d88a", "#5fa8ff", "#ffd54a", "#d88cff", "#4de0e0", "#ff9be0", "#b5e655")
MARKERS = ("o", "s", "D", "^")
FEW = 4
"""Methods whose Dice bars can show, from zero; of more there are points, on a scale that begins below the lowest."""
OVERLAY_ROWS = 5
DPI = 130


def draw_figures(output: Path, progress: Callable[[int, int], None] = lambda _done, _total: None) -> list[Path]:
    """Draw `curves.png`, `sites.png` and `segmentations.png` into a result directory.

    Args:
        output: a result directory of `fedseg simulate`.
        progress: called with the number of pictures that are done and their total.

    Raises:
        StoreError: the directory holds no finished simulation.
    """
    result = load_result(output)
    jobs: list[tuple[str, Callable[[], Figure]]] = [
        ("curves.png", lambda: curves_figure(output, result)),
        ("sites.png", lambda: sites_figure(result)),
        ("segmentations.png", lambda: segmentations_figure(output, result)),
    ]
    paths = []
    for number, (name, draw) in enumerate(jobs):
        progress(number, len(jobs))
        paths.append(_save(draw(), output / name))
    progress(len(jobs), len(jobs))
    return paths


def draw_study(directories: Sequence[Path], path: Path) -> Path:
    """Draw every method at every hospital, the mean over seeds.

    Args:
        directories: results of one study.
        path: of the PNG file.

    Raises:
        StoreError: a directory holds no finished simulation, or they are of several studies.
    """
    return _save(sites_figure(mean_of_seeds(directories)), path)


def curves_figure(output: Path, result: Result) -> Figure:
    """Mean validation Dice over rounds, with the range over sites as a band."""
    figure, axis = _figure(7.5, 3.4)
    for method, colour in method_colours(result).items():
        runs = [f"local-{site}" for site in result["sites"]] if method == "local" else [method]
        rounds, dice = _dice_by_round(output, runs)
        if not rounds:
            continue
        dashed = "--" if method in ("pooled", "local") else "-"
        axis.plot(
            rounds, [mean(values) for values in dice], dashed, color=colour, label=method, linewidth=2, marker="o", ms=3
        )
        if method not in ("pooled", "local") and len(result["headline"]) == 1:
            axis.fill_between(
                rounds, [min(v) for v in dice], [max(v) for v in dice], color=colour, alpha=0.15, linewidth=0
            )
    axis.set(xlabel="round", ylabel="mean validation Dice")
    axis.set_title(f"{result['name']}: learning curves", loc="left")
    axis.set_ylim(0, 1)
    _count_rounds(axis)
    axis.legend(frameon=False, loc="lower right")
    return figure


def run_figure(output: Path, run: str) -> Figure:
    """One run by itself: mean Dice over rounds, and the range over its sites."""
    figure, axis = _figure(7.5, 3.4)
    rounds, dice = _dice_by_round(output, [run])
    if rounds:
        axis.plot(rounds, [mean(values) for values in dice], color=COLOURS[0], linewidth=2, marker="o", ms=3)
        axis.fill_between(
            rounds, [min(v) for v in dice], [max(v) for v in dice], color=COLOURS[0], alpha=0.15, linewidth=0
        )
    axis.set(xlabel="round", ylabel="mean validation Dice")
    axis.set_ylim(0, 1)
    _count_rounds(axis)
    return figure


def _count_rounds(axis: Any) -> None:
    """Whole rounds below an axis, however few there are."""
    axis.xaxis.get_major_locator().set_params(integer=True)
    low, high = axis.get_xlim()
    if high - low < 1:
        axis.set_xlim(math.floor(low), math.ceil(high))


def _dice_by_round(output: Path, runs: Sequence[str]) -> tuple[list[int], list[list[float]]]:
    found: dict[int, list[float]] = {}
    with reader(output) as store:
        for run in runs:
            for row in store("SELECT * FROM metrics WHERE run = ? AND name = 'dice' ORDER BY server_round, site", run):
                found.setdefault(row["server_round"], []).append(row["value"])
    rounds = sorted(found)
    return rounds, [found[number] for number in rounds]


def sites_figure(result: Result) -> Figure:
    """Final Dice of every method at every site, and apart from them at hospitals that took no part."""
    colours, hospitals = method_colours(result), result.get("hospitals", {})
    unseen = unseen_of(result)
    sites = [*result["sites"], *unseen]
    places = np.arange(len(sites)) + np.array([0.6 * (site in unseen) for site in sites])
    figure, axis = _figure(max(6.0, 1.1 * len(sites) + 2), 4.2)
    width, few, lowest = 0.8 / len(colours), len(colours) <= FEW, 1.0
    for number, (method, colour) in enumerate(colours.items()):
        final = result["final"][method]
        dice = [(final["sites"] | final.get("unseen", {})).get(site, math.nan) for site in sites]
        at = places + (number - (len(colours) - 1) / 2) * width
        if few:
            bars = axis.bar(at, dice, width * 0.92, color=colour, label=method)
            names = ["" if math.isnan(value) else f"{value:.2f}" for value in dice]
            axis.bar_label(bars, names, fontsize=6, padding=1)
        else:
            axis.plot(
                at, dice, marker(number - len(colours) + len(result["headline"])), color=colour, label=method, ms=5
            )
        lowest = min(lowest, *(value for value in dice if not math.isnan(value)))
    labels = []
    for site in sites:
        size = "unseen" if site in unseen else counted(result["sites"][site]["training_cases"], "case")
        scanner = hospitals.get(site, {}).get("scanner")
        labels.append("\n".join([site, *([scanner] if scanner else []), size]))
    axis.set_xticks(places, labels, fontsize=8 if hospitals else None)
    if unseen:
        axis.axvline(float(places[len(result["sites"])]) - 0.8, color="0.6", linewidth=0.8, linestyle=":")
    if few:
        axis.set_ylim(0, 1.12)
        axis.set_yticks(np.linspace(0, 1, 6))
    else:
        bottom, top = math.floor(20 * (lowest - 0.01)) / 20, axis.get_ylim()[1]
        axis.set_ylim(bottom, top + 0.25 * (top - bottom))  # room for the legend
    axis.set(ylabel="mean Dice")
    axis.set_title(f"{result['name']}: who gains (scored on {result['test']})", loc="left")
    axis.legend(frameon=False, ncols=6, loc="upper left", fontsize=8, handlelength=1.2, columnspacing=1.2)
    return figure


@dataclass(frozen=True)
class _Panel:
    """One section of a case with one segmentation on it."""

    title: str
    image: NDArray[np.float32]
    label: NDArray[Any]


def segmentations_figure(output: Path, result: Result) -> Figure:
    """Some test cases from worst to best: the reference, and what local, federated and pooled training make of it."""
    from fedseg.layout import Layout

    layout = Layout.model_validate_json((output / "layout.json").read_text())
    method = next(iter(result["headline"]))
    home = {site.name for site in layout.sites}
    scores = [row for row in read_scores(output / "scores.csv") if row.run == method and row.site in home]
    shifted = any(view.shift is not None for view in layout.views.values())
    rows = [_panels(output, layout, method, site, case) for site, case in _choose(scores, same_case=shifted)]
    figure = Figure(figsize=(2.6 * len(rows[0]), 2.75 * len(rows)), facecolor="black", layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for axis, panel in zip(axes.flat, (panel for row in rows for panel in row), strict=True):
        axis.set_axis_off()
        axis.set_title(panel.title, color="white", fontsize=8)
        low, high = np.quantile(panel.image, [0.01, 0.995])
        axis.imshow(panel.image[::-1, ::-1], cmap="gray", vmin=low, vmax=high, interpolation="bicubic")
        for value in np.unique(panel.label[panel.label > 0]):
            colour = STRUCTURES[(int(value) - 1) % len(STRUCTURES)]
            axis.contour(panel.label[::-1, ::-1] == value, levels=[0.5], colors=[colour], linewidths=1.3)
    return figure


def photo(picture: Figure | Path) -> bytes:
    """A figure of pixels, or a PNG file, as JPEG."""
    data = io.BytesIO()
    if isinstance(picture, Path):
        Image.open(picture).convert("RGB").save(data, "JPEG", quality=88)
    else:
        picture.savefig(data, format="jpeg", dpi=DPI, pil_kwargs={"quality": 88})
    return data.getvalue()


def _choose(rows: Sequence[CaseRow], *, same_case: bool) -> list[tuple[str, str]]:
    """Sites in turn, with cases from the federation's worst to its best, or with one ordinary case as each of them sees it."""
    sites = list(dict.fromkeys(row.site for row in rows))
    sites = [sites[index] for index in np.unique(np.linspace(0, len(sites) - 1, OVERLAY_ROWS).astype(int))]
    chosen = []
    for number, site in enumerate(sites):
        dice: dict[str, list[float]] = {}
        for row in rows:
            if same_case or row.site == site:
                dice.setdefault(row.case, []).append(row.dice)
        ranked = sorted(dice, key=lambda case: mean(dice[case]))
        chosen.append((site, ranked[int((0.5 if same_case else (number + 0.5) / len(sites)) * len(ranked))]))
    return chosen


def _panels(output: Path, layout: Any, method: str, site: str, case_name: str) -> list[_Panel]:
    from fedseg.data.features import align
    from fedseg.data.preprocess import prepare_case
    from fedseg.federated.site import Site
    from fedseg.inference import predict_label
    from fedseg.metrics import score_case
    from fedseg.model_file import load_model, model_path

    owner = layout.scored_on(site) or next(config for config in layout.sites if config.name == site)
    case = Site(owner).cohort().subset([case_name]).cases[0]
    panels: list[_Panel] = []
    reference, prepared, index = None, None, 0
    for title, run in ((f"{site} alone", f"local-{site}"), (method, method), ("pooled", "pooled")):
        path = model_path(output, run, site)
        if not path.exists():
            continue
        experiment, model, fingerprint = load_model(path)
        if prepared is None or reference is None:
            prepared = prepare_case(case, experiment.task, experiment.data, owner.shift)
            reference = prepared.label
            assert reference is not None
            index = int(np.argmax([len(np.unique(section)) * 1e6 + (section > 0).sum() for section in reference]))
            panels.append(_Panel(f"{site}: {case_name}, reference", prepared.image[0, index], reference[index]))
        label = predict_label(
            model,
            align(prepared, experiment.data, fingerprint).image,
            experiment.training.patch_size,
            overlap=experiment.evaluation.overlap,
            slicing=experiment.slicing,
        )
        scores = score_case(label, reference, prepared.spacing, experiment.task.structures, surface=False)
        dice = mean(score.dice for score in scores.values())
        panels.append(_Panel(f"{title}: Dice {dice:.2f}", prepared.image[0, index], label[index]))
    return panels


def method_colours(result: Result) -> dict[str, str]:
    """The methods that a figure shows, baselines first."""
    shown = {"local": LOCAL, "pooled": POOLED}
    colours = {name: colour for name, colour in shown.items() if name in result["final"]}
    return colours | {method: COLOURS[number % len(COLOURS)] for number, method in enumerate(result["headline"])}


def marker(number: int) -> str:
    """Of the method of this number: colours come again, the two together do not."""
    return MARKERS[number // len(COLOURS) % len(MARKERS)]


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    return figure, axis


def _save(figure: Figure, path: Path) -> Path:
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    figure.savefig(aside, dpi=DPI, format="png")
    aside.replace(path)
    return path
