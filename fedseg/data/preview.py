"""A contact sheet of a cohort: three sections of each case with its labels as contours, for a quick look."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.data.cohort import Case, Cohort, read_cohort
from fedseg.data.volume import Spacing, read_image, read_label
from fedseg.errors import CaseError

_COLOURS = ["#e6550d", "#31a354", "#3182bd", "#fdd835", "#ab47bc", "#26c6da", "#ec407a", "#9ccc65"]
_DPI = 84
_ROWS_BEFORE_TWO_BESIDE = 4
_SOFT_TISSUE = (-160.0, 240.0)
"""Hounsfield units from black to white, for images whose values look like them."""


def preview(cohort: Path | Cohort, out_png: Path, *, cases: int = 6) -> Path:
    """Draw the first cases: axial, coronal and sagittal sections in radiological convention (patient's right at left).

    Args:
        cohort: a cohort or its folder.
        out_png: the picture to write.
        cases: how many at most; from four on, two stand side by side.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    members = (read_cohort(cohort) if isinstance(cohort, Path) else cohort).cases[:cases]
    beside = 1 if len(members) < _ROWS_BEFORE_TWO_BESIDE else 2
    lines = -(-len(members) // beside)
    figure = Figure(figsize=(7.5 * beside, 2.5 * lines), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, 3 * beside, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, case in zip(axes.reshape(-1, 3), members, strict=False):
        _draw_case(row, case)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    aside = out_png.with_name(f".{os.getpid()}-{out_png.name}")
    figure.savefig(aside, dpi=_DPI, format="png", pil_kwargs={"optimize": True})
    aside.replace(out_png)
    return out_png


def _draw_case(row: Any, case: Case) -> None:
    row[0].set_title(case.name, color="white", fontsize=8, loc="left")
    try:
        volume = read_image(case.images)
        label = read_label(case.label).array if case.label else np.zeros(volume.array.shape[1:], dtype=np.uint8)
    except CaseError as error:
        row[0].text(0, 0.5, str(error.reason), color="white", fontsize=9)
        return
    image = volume.array[0]
    if label.shape != image.shape:
        label = np.zeros(image.shape, dtype=np.uint8)
    low, high = _SOFT_TISSUE if image.min() < -500 else np.quantile(image, [0.01, 0.995])
    at = middle(label)
    for axis, (number, plane) in zip(row, enumerate(("axial", "coronal", "sagittal")), strict=True):
        view, contour = section(image, number, at[number]), section(label, number, at[number])
        axis.imshow(
            view, cmap="gray", vmin=low, vmax=high, aspect=aspect(volume.spacing, number), interpolation="bilinear"
        )
        for value in np.unique(contour[contour > 0]):
            colour = _COLOURS[(int(value) - 1) % len(_COLOURS)]
            axis.contour(contour == value, levels=[0.5], colors=[colour], linewidths=1.0)
        axis.text(0.02, 0.02, plane, color="#aaaaaa", fontsize=6, transform=axis.transAxes)


def middle(label: NDArray[Any]) -> tuple[int, int, int]:
    """Along each axis the section that shows most structures, then most of them."""
    best = []
    for axis in range(3):
        sections = np.moveaxis(label, axis, 0).reshape(label.shape[axis], -1)
        kinds = np.array([len(np.unique(section)) for section in sections])
        score = kinds * sections.shape[1] + (sections > 0).sum(axis=1)
        best.append(int(score.argmax()) if score.any() and label.any() else label.shape[axis] // 2)
    return (best[0], best[1], best[2])


def section(array_DHW: NDArray[Any], axis: int, index: int) -> NDArray[Any]:
    """A section as radiologists look at it: head or front up, the patient's right at left."""
    return np.asarray(np.take(array_DHW, index, axis=axis)[::-1, ::-1])


def aspect(spacing: Spacing, axis: int) -> float:
    """Height of a voxel over its width in such a section."""
    vertical, horizontal = [mm for other, mm in enumerate(spacing) if other != axis]
    return vertical / horizontal
