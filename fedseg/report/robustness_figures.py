"""Pictures of `robustness.json`: each function takes what the file holds and returns a figure."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fedseg.report.figures import COLOURS, LOCAL, POOLED, _save

Document = dict[str, Any]
Estimate = dict[str, Any]

VIRIDIS = matplotlib.colormaps["viridis"]
COLUMNS = 5
"""Small multiples in a row."""


def draw_robustness(document: Document, folder: Path) -> list[Path]:
    """Draw what was measured into `robustness-*.png`."""
    jobs: list[tuple[str, str, Callable[[Document], Figure]]] = [
        ("cross_site", "cross-site", cross_site_figure),
        ("cross_site", "sites", hospitals_figure),
        ("grid", "severities", severity_figure),
        ("calibration", "reliability", reliability_figure),
    ]
    return [_save(draw(document), folder / f"robustness-{name}.png") for part, name, draw in jobs if document.get(part)]


def cross_site_figure(document: Document) -> Figure:
    """Heat map: which network (rows) does how well at which hospital (columns)."""
    cells, hospitals = document["cross_site"]["dice"], document["hospitals"]
    names = list(hospitals)
    dice = np.array([[_value(row.get(name)) for name in names] for row in cells.values()])
    figure, axis = _figure(1.9 + 0.95 * len(names), 1.1 + 0.3 * len(cells))
    low, high = _nice_range(dice)
    colours = VIRIDIS((dice - low) / (high - low))
    for (row, column), value in np.ndenumerate(dice):
        if math.isfinite(value):
            ground = colours[row, column]
            axis.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, color=ground, linewidth=0))
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=_legible_on(ground), fontsize=8)
    axis.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(cells) - 0.5, -0.5))
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_xticks(range(len(names)), [_titled(name, hospitals[name]) for name in names], fontsize=8)
    axis.set_yticks(range(len(cells)), list(cells), fontsize=8)
    unseen = [number for number, name in enumerate(names) if not hospitals[name]["takes_part"]]
    if unseen:
        axis.axvline(unseen[0] - 0.5, color=LOCAL, linewidth=1, linestyle=":")
    axis.set_title(f"{document['name']}: Dice of networks (rows) at hospitals", loc="left")
    return figure


def hospitals_figure(document: Document) -> Figure:
    """Bars with 95 % intervals: every method at every hospital."""
    cells, hospitals = document["cross_site"]["dice"], document["hospitals"]
    rows = _compared(document)
    figure, axis = _figure(max(6.0, 0.5 + 0.28 * (len(rows) + 1.2) * len(hospitals)), 4.2)
    width = 0.82 / len(rows)
    for number, (row, colour) in enumerate(rows.items()):
        known = [(place, cells[row][name]) for place, name in enumerate(hospitals) if name in cells[row]]
        at = [place + (number - (len(rows) - 1) / 2) * width for place, _ in known]
        values = [_value(one) for _, one in known]
        axis.bar(at, values, width * 0.92, color=colour, label=row, yerr=_reach([one for _, one in known]),
                 error_kw={"elinewidth": 0.9, "capsize": 2, "ecolor": "#444444"})  # fmt: skip
    axis.set_xticks(range(len(hospitals)), [_titled(name, about) for name, about in hospitals.items()], fontsize=8)
    axis.set_ylim(0, 1.12)
    axis.set_yticks(np.linspace(0, 1, 6))
    axis.grid(axis="y", alpha=0.25)
    axis.set(ylabel="mean Dice, 95 % interval over persons")
    axis.set_title(f"{document['name']}: hospital by hospital", loc="left")
    axis.legend(frameon=False, ncols=min(6, len(rows)), loc="upper left", fontsize=8)
    return figure


def severity_figure(document: Document) -> Figure:
    """Small multiples, one for each effect: Dice over severities, with 95 % intervals as bands; 0 is the clean image."""
    grid = document["grid"]
    effects, rows = grid["effects"], _coloured(list(grid["rows"]))
    columns = min(COLUMNS, len(effects))
    lines = math.ceil(len(effects) / columns)
    figure = Figure(figsize=(max(4.5, 2.25 * columns), 1.9 * lines + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    at = [0, *grid["severities"]]
    for axis, effect in zip(axes.flat, effects, strict=False):
        for name, colour in rows.items():
            row = grid["rows"][name]
            points = [row["clean"], *row["dice"][effect]]
            axis.plot(
                at, [_value(one) for one in points], color=colour, label=name, marker="o", markersize=2.5, linewidth=1.4
            )
            ends = np.array([one["ci95"] or (math.nan, math.nan) for one in points], dtype=float)
            axis.fill_between(at, ends[:, 0], ends[:, 1], color=colour, alpha=0.13, linewidth=0)
        axis.set_title(effect, fontsize=8.5)
        axis.set_ylim(0, 1)
        axis.set_xticks(at)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    for axis in axes.flat[len(effects) :]:
        axis.set_visible(False)
    figure.suptitle(f"{document['name']}: Dice over severity of simulated shifts", fontsize=11, x=0.02, ha="left")
    figure.supylabel("mean Dice", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("severity (0: clean)", fontsize=7.5)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    side_by_side = max(1, int(figure.get_figwidth() / (0.5 + 0.07 * max(map(len, rows)))))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(rows), side_by_side), frameon=False, fontsize=8
    )
    return figure


def reliability_figure(document: Document) -> Figure:
    """Share of right voxels over confidence, near the structures' border; below them, how many voxels there are."""
    rows = _coloured(list(document["calibration"]))
    figure = Figure(figsize=(5.6, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, linestyle=":")
    for name, colour in rows.items():
        found = document["calibration"][name]
        bins = found["reliability"]
        voxels = np.array(bins["voxels"], dtype=float)
        shares = voxels / voxels.sum()
        known = [place for place, share in enumerate(shares) if share > 1e-4]  # a handful of voxels says nothing
        label = f"{name}: ECE {_value(found['ece']):.3f}"
        above.plot([bins["confidence"][place] for place in known], [bins["accuracy"][place] for place in known],
                   color=colour, marker="o", markersize=3, linewidth=1.4, label=label)  # fmt: skip
        edges = np.linspace(0, 1, len(shares) + 1)
        below.stairs(shares, edges, color=colour, linewidth=1.2)
    above.set(ylabel="share of right voxels", ylim=(0, 1))
    above.set_title(f"{document['name']}: is confidence what it is worth?", loc="left")
    above.legend(frameon=False, fontsize=8, loc="upper left")
    below.set(xlabel="confidence", ylabel="share of voxels", xlim=(0, 1))
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure


def _legible_on(ground: Any) -> str:
    """White or black, whichever stands out more (by WCAG's contrast); neither is the page's ground or ink."""
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in ground[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#fefefe" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#010101"


def _compared(document: Document) -> dict[str, str]:
    """The rows that bars are drawn for, with their colours; each site's networks are left to the heat map."""
    kinds = {name: row["kind"] for name, row in document["cross_site"]["rows"].items()}
    shown = [name for name, kind in kinds.items() if kind in ("method", "pooled", "local")]
    return _coloured(shown or list(kinds))


def _coloured(names: list[str]) -> dict[str, str]:
    """Baselines in grey, first; methods in colours."""
    fixed = {name: colour for name, colour in (("local", LOCAL), ("pooled", POOLED)) if name in names}
    others = [name for name in names if name not in fixed]
    return fixed | {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(others)}


def _value(estimate: Estimate | None) -> float:
    return math.nan if estimate is None or estimate["value"] is None else float(estimate["value"])


def _reach(estimates: list[Estimate]) -> Any:
    """How far intervals go down and up, `(2, n)`."""
    ends = np.array([one["ci95"] or (math.nan, math.nan) for one in estimates], dtype=float)
    values = np.array([_value(one) for one in estimates])
    return np.clip(np.nan_to_num([values - ends[:, 0], ends[:, 1] - values]), 0, None)


def _nice_range(values: Any) -> tuple[float, float]:
    """For colours: from the tenth below the smallest value to the one above the largest."""
    known = values[np.isfinite(values)]
    if not len(known):
        return 0.0, 1.0
    low, high = math.floor(10 * known.min()) / 10, math.ceil(10 * known.max()) / 10
    return low, max(high, low + 0.1)


def _titled(name: str, about: dict[str, Any]) -> str:
    lines = [name, *([about["scanner"]] if about["scanner"] else []), *([] if about["takes_part"] else ["(unseen)"])]
    return "\n".join(lines)


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
    return figure, axis
