"""A contact sheet of simulated shifts: every effect at five severities, or two cases through every scanner."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.data.cohort import Case
from fedseg.data.preview import aspect, middle, section
from fedseg.data.shift.cases import shifted
from fedseg.data.shift.catalogue import EFFECTS, HABITS, SEVERITIES
from fedseg.data.shift.profiles import Annotator, Habit, ScannerProfile, Shift, single_effect
from fedseg.data.volume import LabelMap, Volume, read_image, read_label

_DPI = 75
_CELL = 1.3
"""Inches."""
_ROWS_BEFORE_TWO_BESIDE = 9
_COLOURS = ("#ff5d5d", "#51d88a", "#5fa8ff", "#ffd54a", "#d88cff", "#4de0e0", "#ff9be0", "#b5e655")
_ACCENT, _TRACK = "#ffb000", "#444444"
_SOFT_TISSUE = (-160.0, 240.0)
_FULL_BAR = 1.5
"""Difference at which the underline is as wide as its picture."""


@dataclass(frozen=True)
class Picture:
    """One cell of the sheet."""

    image: NDArray[Any]
    """Section, grey from 0 to 1; a difference from -1 to 1."""
    label: NDArray[Any]
    reference: NDArray[Any] | None
    """Section of the label before an annotator changed it."""
    aspect: float
    caption: str
    difference: float | None = None
    """Drawn as an underline: root mean square of the z-scored images, or for annotators 1 - Dice; None: no underline."""
    signed: bool = False


Rows = Mapping[str, Sequence[Picture]]


def effect_rows(case: Case, names: Sequence[str], *, seed: int = 0, axis: int = 0) -> Rows:
    """One case under each effect or habit: clean, then at five severities.

    Args:
        case: with a label.
        names: of effects and habits.
        seed: of the site.
        axis: 0, 1, 2 (D, H, W): which looks at us.
    """
    volume, label = read_image(case.images), read_label(case.label)
    rows = {}
    for name in names:
        row = [_picture(volume, label, axis, "clean")]
        for severity in SEVERITIES:
            strength = (EFFECTS[name] if name in EFFECTS else HABITS[name]).strengths[severity - 1]
            seen = shifted(volume, label, _single(name, severity, seed), case.name)
            row.append(_picture(*seen, axis, f"{severity}: {strength:g}", (volume, label)))
        rows[name] = row
    return rows


def profile_rows(
    cases: Sequence[Case], profiles: Mapping[str, ScannerProfile], *, seed: int = 0, axis: int = 0
) -> Rows:
    """Two cases through each scanner: clean, seen, and what the scanner added.

    Args:
        cases: with labels; the first two are drawn.
        profiles: by the name that is shown.
        seed: of the site.
        axis: 0, 1, 2 (D, H, W): which looks at us.
    """
    rows = {}
    for name, profile in profiles.items():
        row = []
        for case in cases[:2]:
            clean = read_image(case.images), read_label(case.label)
            seen = shifted(*clean, Shift(scanner=profile, seed=seed), case.name)
            row += [_picture(*clean, axis, "clean"), _picture(*seen, axis, "seen", clean)]
            row.append(_difference(*seen, axis, clean))
        rows[name] = row
    return rows


def draw_sheet(rows: Rows, out_png: Path) -> Path:
    """Draw the rows; two stand side by side where there are many."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows.values())
    beside = 1 if len(rows) < _ROWS_BEFORE_TWO_BESIDE else 2
    lines = -(-len(rows) // beside)
    figure = Figure(figsize=(beside * columns * _CELL, lines * (_CELL + 0.32)), facecolor="black")
    FigureCanvasAgg(figure)
    figure.subplots_adjust(
        left=0.005, right=0.995, bottom=0.02, top=1 - 0.3 / (lines * (_CELL + 0.32)), wspace=0.04, hspace=0.26
    )
    axes = figure.subplots(lines, beside * columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, (name, row) in enumerate(rows.items()):
        first = (number // lines) * columns
        for column, picture in enumerate(row):
            axis = axes[number % lines, first + column]
            _draw(axis, picture)
            if column == 0:
                axis.set_title(name, color="white", fontsize=9, loc="left", pad=3)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    aside = out_png.with_name(f".{os.getpid()}-{out_png.name}")
    figure.savefig(aside, dpi=_DPI, format="png", facecolor="black")
    _fewer_colours(aside)
    aside.replace(out_png)
    return out_png


def _single(name: str, severity: int, seed: int) -> Shift:
    if name in EFFECTS:
        return Shift(scanner=single_effect(name, severity), seed=seed)
    return Shift(annotator=Annotator(name=name, habits=(Habit(name=name, severity=severity),)), seed=seed)


def _picture(
    volume: Volume, label: LabelMap, axis: int, caption: str, clean: tuple[Volume, LabelMap] | None = None
) -> Picture:
    at = middle(label.array)[axis]
    same_grid = clean is not None and clean[0].array.shape == volume.array.shape
    if clean is not None and same_grid:
        at = middle(clean[1].array)[axis]
    difference = reference = None
    if clean is not None and same_grid:
        if np.array_equal(volume.array, clean[0].array):
            reference = section(clean[1].array, axis, at)
            difference = _disagreement(label.array, clean[1].array)
        else:
            difference = float(np.sqrt(np.square(_standard(volume) - _standard(clean[0])).mean()))
    return Picture(
        section(_grey(volume), axis, at),
        section(label.array, axis, at),
        reference,
        aspect(volume.spacing, axis),
        caption,
        difference,
    )


def _difference(volume: Volume, label: LabelMap, axis: int, clean: tuple[Volume, LabelMap]) -> Picture:
    if clean[0].array.shape != volume.array.shape:
        return _picture(volume, label, axis, "another grid")
    at = middle(clean[1].array)[axis]
    change = section(_standard(volume) - _standard(clean[0]), axis, at)
    return Picture(
        change / 2, section(label.array, axis, at), None, aspect(volume.spacing, axis), "difference", signed=True
    )


def _is_ct(volume: Volume) -> bool:
    return bool(volume.array.min() < -500)


def _grey(volume: Volume) -> NDArray[np.float32]:
    """Black is 0, white is 1: a soft-tissue window, or the range of the image."""
    image = volume.array[0]
    low, high = _SOFT_TISSUE if _is_ct(volume) else np.quantile(image, [0.01, 0.995])
    return np.asarray(np.clip((image - low) / max(float(high - low), 1e-12), 0, 1), dtype=np.float32)


def _standard(volume: Volume) -> NDArray[np.float32]:
    image = np.clip(volume.array[0], *_SOFT_TISSUE) if _is_ct(volume) else volume.array[0]
    low, high = np.quantile(image, [0.005, 0.995])
    image = np.clip(image, low, high)
    return np.asarray((image - image.mean()) / max(float(image.std()), 1e-12), dtype=np.float32)


def _disagreement(label: NDArray[Any], reference: NDArray[Any]) -> float:
    values = [value for value in np.unique(reference) if value]
    dice = [2 * ((label == v) & (reference == v)).sum() / ((label == v).sum() + (reference == v).sum()) for v in values]
    return float(1 - np.mean(dice)) if dice else 0.0


def _draw(axis: Any, picture: Picture) -> None:
    low, colours = (-1, "RdBu_r") if picture.signed else (0, "gray")
    axis.imshow(picture.image, cmap=colours, vmin=low, vmax=1, aspect=picture.aspect, interpolation="nearest")
    if picture.reference is not None:
        axis.contour(picture.reference > 0, levels=[0.5], colors="white", linewidths=0.6)
    for value in np.unique(picture.label[picture.label > 0]):
        colour = "black" if picture.signed else _COLOURS[(int(value) - 1) % len(_COLOURS)]
        axis.contour(picture.label == value, levels=[0.5], colors=[colour], linewidths=0.8)
    caption = picture.caption
    if picture.difference is not None:
        caption += f"   Δ {picture.difference:.2f}"
        place: dict[str, Any] = {"transform": axis.transAxes, "clip_on": False, "solid_capstyle": "butt"}
        axis.plot([0, 1], [-0.035, -0.035], color=_TRACK, linewidth=2.2, **place)
        width = min(1.0, picture.difference / _FULL_BAR)
        axis.plot([0, width], [-0.035, -0.035], color=_ACCENT, linewidth=2.2, **place)
    axis.text(
        0.02,
        0.02,
        caption,
        color="white",
        fontsize=6,
        transform=axis.transAxes,
        bbox={"facecolor": "black", "alpha": 0.5, "pad": 0.8, "linewidth": 0},
    )


def _fewer_colours(path: Path) -> None:
    """A palette instead of true colour: a third of the bytes, and nobody sees it."""
    from PIL import Image

    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(path, format="PNG", optimize=True)
