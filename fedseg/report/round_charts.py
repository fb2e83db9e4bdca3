"""Round by round, hospital by hospital: small charts of what the run store holds, one for each hospital."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedseg.coordinator.state import reader
from fedseg.report.document import Charts
from fedseg.report.drawing import Drawing, drawing_of
from fedseg.report.figures import LOCAL

MOST = 12
"""Hospitals that are shown: those that are served worst."""
SIZE = (1.7, 1.3)
"""Of one chart in inches: four side by side on paper, two on a phone."""

Curve = dict[int, float]
"""By round."""
Curves = dict[str, dict[str, Curve]]
"""By hospital and method."""

WORDS = {
    "dice": ("Dice, hospital by hospital", "Of the network on each hospital's own validation cases, over the rounds."),
    "loss": (
        "Training loss, hospital by hospital",
        "Over the rounds. It should fall and level off. Where it stays far above the others', a hospital's images or outlines "
        "may be of another kind.",
    ),
    "cosine": (
        "Agreement with the joint update, hospital by hospital",
        "Cosine of the angle between each hospital's update and the joint one, over the rounds. 1: the same way; 0: at right "
        "angles; below 0: against it. A hospital far below the others pulls elsewhere, or counts for little because it has few "
        "cases.",
    ),
}
"""A title, and what the charts show."""


def round_charts(
    directory: Path, runs: Mapping[str, str], sites: Sequence[str], *, alone: bool = False
) -> list[Charts]:
    """Charts of Dice, training loss and cosine, as far as they were recorded.

    Args:
        directory: of the run store.
        runs: colours of the runs that are compared.
        sites: the hospitals, in their order; of many, those with the lowest final Dice are shown.
        alone: show each hospital's training alone (`local-SITE`) beside them.
    """
    found = _read(directory, runs, sites, alone=alone)
    shown, note = list(sites), ""
    if len(shown) > MOST:
        last = {
            site: min((curve[max(curve)] for curve in found["dice"].get(site, {}).values()), default=1.0)
            for site in sites
        }
        worst = set(sorted(sites, key=lambda site: last[site])[:MOST])
        shown, note = (
            [site for site in sites if site in worst],
            f" The {MOST} of {len(sites)} hospitals with the lowest Dice.",
        )
    colours = dict(runs) | ({"local": LOCAL} if alone else {})
    charts = []
    for name, (title, caption) in WORDS.items():
        curves = {site: found[name][site] for site in shown if found[name].get(site)}
        if not curves:
            continue
        drawn = {method for by_method in curves.values() for method in by_method}
        legend = [
            (colour, "alone" if method == "local" else method) for method, colour in colours.items() if method in drawn
        ]
        alts = [f"{site}: {_told(by_method)}" for site, by_method in curves.items()]
        charts.append(
            Charts(_panels(curves, colours, name), caption + note, alts, legend if len(legend) > 1 else (), title)
        )
    return charts


def _read(directory: Path, runs: Iterable[str], sites: Sequence[str], *, alone: bool) -> dict[str, Curves]:
    names = {run: run for run in runs} | ({f"local-{site}": "local" for site in sites} if alone else {})
    found: dict[str, Curves] = {name: {} for name in WORDS}

    def keep(name: str, run: str, site: str, server_round: int, value: float | None) -> None:
        if run in names and site in sites and value is not None and math.isfinite(value):
            found[name].setdefault(site, {}).setdefault(names[run], {})[server_round] = value

    with reader(directory) as store:
        for row in store("SELECT * FROM metrics WHERE name = 'dice' ORDER BY server_round"):
            keep("dice", row["run"], row["site"], row["server_round"], row["value"])
        for row in store("SELECT * FROM updates WHERE status = 'accepted' ORDER BY server_round"):
            run, site, server_round = row["run"], row["site"], row["server_round"]
            keep("loss", run, site, server_round, json.loads(row["training"]).get("loss"))
            if "cosine" in row.keys() and names.get(run) != "local":  # noqa: SIM118 - of values; and who is alone agrees
                keep("cosine", run, site, server_round, row["cosine"])
    return found


def _panels(curves: Curves, colours: Mapping[str, str], name: str) -> list[Drawing]:
    points = [
        (at, value) for by_method in curves.values() for curve in by_method.values() for at, value in curve.items()
    ]
    first, last = min(at for at, _ in points), max(at for at, _ in points)
    low, high = min(value for _, value in points), max(value for _, value in points)
    if name == "cosine":
        low, high = min(0.0, low), 1.0
    room = 0.06 * (high - low) or 0.05
    drawn = []
    for site, by_method in curves.items():
        figure = Figure(figsize=SIZE)
        FigureCanvasAgg(figure)
        axis = figure.add_axes((0.2, 0.17, 0.76, 0.66))
        for method, curve in by_method.items():
            dashes, marker = "--" if method == "local" else "-", "o" if len(curve) == 1 else ""
            axis.plot([*curve], [*curve.values()], dashes, color=colours[method], linewidth=1.2, marker=marker, ms=3)
        axis.set_title(site if len(site) <= 18 else f"{site[:17]}…", fontsize=8.5, pad=3)
        axis.set(ylim=(low - room, high + room), xlim=(first - 0.5, last + 0.5))
        axis.set_xticks([first, last] if last > first else [first])
        axis.yaxis.set_major_locator(MaxNLocator(3))
        axis.tick_params(labelsize=7.5, length=2, pad=2)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        drawn.append(drawing_of(figure))
    return drawn


def _told(by_method: Mapping[str, Curve]) -> str:
    parts = []
    for method, curve in by_method.items():
        ends = [f"{curve[at]:.2f} in round {at}" for at in dict.fromkeys((min(curve), max(curve)))]
        parts.append(f"{'alone' if method == 'local' else method} {', '.join(ends)}")
    return "; ".join(parts)
