"""Draw a label as another annotator would: what no normalisation of intensities can undo.

Borders move by less than a voxel: the outline of everything labelled is smoothed, and its level chosen so that the volume
comes out as promised. Faces between structures stay where they are unless a habit is about them.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedseg.data.shift.draw import Draw, draw_for
from fedseg.data.shift.profiles import Annotator

Label3D = NDArray[Any]


def annotate(label_DHW: Label3D, annotator: Annotator, seed: int, case: str) -> Label3D:
    """The label that this annotator would draw.

    Args:
        label_DHW: label values.
        annotator: the habits, applied in their order.
        seed: of the site: on which side a face is moved, for instance.
        case: name of the case; the same arguments give the same label, in every process.

    Returns:
        Label values, some of those that came in; at least one structure stays.
    """
    drawn = label_DHW
    for habit in annotator.habits:
        present = [int(value) for value in np.unique(drawn) if value]
        chosen = [value for value in present if not habit.structures or value in habit.structures]
        draw = draw_for(seed, habit.name, case)
        if chosen and draw_for(seed, f"{habit.name} happens", case).case.random() < habit.probability:
            drawn = _HABITS[habit.name](drawn, chosen, habit.amount, draw)
    return drawn


def _generous(label: Label3D, chosen: list[int], share: float, _: Draw) -> Label3D:
    return _redrawn(label, chosen, 1 + share)


def _tight(label: Label3D, chosen: list[int], share: float, _: Draw) -> Label3D:
    return _redrawn(label, chosen, 1 - share)


def _unsteady(label: Label3D, chosen: list[int], roughness: float, draw: Draw) -> Label3D:
    wobble = ndimage.gaussian_filter(draw.case.standard_normal(label.shape, dtype=np.float32), 1.5)
    return _redrawn(label, chosen, 1.0, wobble=roughness * wobble / wobble.std())


def _redrawn(
    label: Label3D,
    chosen: list[int],
    share: float,
    *,
    widths: tuple[float, float, float] = (0.7, 0.7, 0.7),
    wobble: float | NDArray[np.float32] = 0.0,
) -> Label3D:
    """Draw the outline of the chosen structures anew: smoothed by `widths` voxels, with `share` of their volume."""
    before = np.isin(label, chosen)
    # A voxel that nobody would draw has none of the smoothed outline, however the hand wobbles.
    smooth = ndimage.gaussian_filter(before.astype(np.float32), widths)
    level = np.where(smooth > 0.02, smooth + 0.5 * wobble * np.sqrt(smooth * (1 - smooth).clip(0)), 0)
    level[(label > 0) & ~before] = 0
    count = min(round(share * int(before.sum())), int((level > 0).sum()))
    highest = np.argsort(-level, axis=None, kind="stable")[: max(count, 1)]
    after = np.zeros(label.size, dtype=bool)
    after[highest] = True
    return _reassigned(label, before, after.reshape(label.shape))


def _reassigned(label: Label3D, before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Label3D:
    """Voxels that are new get the value of the nearest old one."""
    nearest = ndimage.distance_transform_edt(~before, return_distances=False, return_indices=True)
    result = np.where(before, 0, label)
    result[after] = label[tuple(nearest)][after]
    return result.astype(label.dtype)


def _moved_face(label: Label3D, chosen: list[int], voxels: float, draw: Draw) -> Label3D:
    """Move the largest face between two of the structures, to the site's side."""
    one, other = _largest_face(label, chosen)
    if other is None:
        return label
    if draw.site.random() < 0.5:
        one, other = other, one
    away = ndimage.distance_transform_edt(label != one)
    result = label.copy()
    result[(label == other) & (away <= voxels)] = one
    return result if (result == other).any() else label


def _largest_face(label: Label3D, chosen: Iterable[int]) -> tuple[int | None, int | None]:
    faces: dict[tuple[int, int], int] = {}
    for axis in range(3):
        low, high = (np.take(label, range(first, label.shape[axis] + first - 1), axis=axis) for first in (0, 1))
        for one, other in itertools.combinations(chosen, 2):
            touching = ((low == one) & (high == other)) | ((low == other) & (high == one))
            faces[one, other] = faces.get((one, other), 0) + int(touching.sum())
    best = max(faces, key=lambda pair: faces[pair], default=None)
    return best if best is not None and faces[best] else (None, None)


def _flat(label: Label3D, chosen: list[int], sigma: float, draw: Draw) -> Label3D:
    """Smooth the outline within the slices of the site's plane; the volume stays."""
    across = draw.pick_axis()
    d, h, w = (0.0 if axis == across else sigma for axis in range(3))
    return _redrawn(label, chosen, 1.0, widths=(d, h, w))


def _missed(label: Label3D, chosen: list[int], chance: float, draw: Draw) -> Label3D:
    """Each structure is left out with this chance; the case keeps one at least."""
    lots = draw.case.random(256)
    missed = [value for value in chosen if lots[value % 256] < chance]
    if set(missed) >= {int(value) for value in np.unique(label) if value}:
        missed.remove(max(missed, key=lambda value: lots[value % 256]))
    return np.where(np.isin(label, missed), 0, label).astype(label.dtype)


def _merged(label: Label3D, chosen: list[int], chance: float, draw: Draw) -> Label3D:
    """All chosen structures get the lowest of their values."""
    if draw.case.random() >= chance:
        return label
    return np.where(np.isin(label, chosen), min(chosen), label).astype(label.dtype)


_HABITS: dict[str, Callable[[Label3D, list[int], float, Draw], Label3D]] = {
    "generous": _generous,
    "tight": _tight,
    "unsteady": _unsteady,
    "moved-face": _moved_face,
    "flat": _flat,
    "missed": _missed,
    "merged": _merged,
}
