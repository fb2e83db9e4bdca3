"""How a volume lies in its file: voxel size, order of axes, field of view, pose. Image, label and affine change together."""

from collections.abc import Callable
from typing import Any, Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedseg.data.resample import resample_image, resample_label, resampled_shape
from fedseg.data.shift.draw import Draw
from fedseg.data.shift.profiles import ScannerProfile
from fedseg.data.shift.scanner import happening
from fedseg.data.volume import Geometry, LabelMap, Volume

FRAMES = ("LAS", "LPS", "SRA", "PIR", "IPL")
"""Orders of axes in which scanners and exports store volumes."""

Placed = tuple[Volume, LabelMap]


def place(volume: Volume, label: LabelMap, profile: ScannerProfile, seed: int, case: str) -> Placed:
    """What a case would look like with another scanner's protocol: another grid, which its affine tells.

    Args:
        volume: the case's image.
        label: on the same grid; it goes through the same changes.
        profile: the scanner; only its geometry counts here.
        seed: of the site.
        case: name of the case.
    """
    for effect, strength, draw in happening(profile, seed, case, geometric=True):
        volume, label = _CHANGES[effect.name](volume, label, strength, draw)
    return volume, label


def _coarser(volume: Volume, label: LabelMap, factor: float, draw: Draw) -> Placed:
    spacing = volume.spacing
    chosen = range(3) if draw.axis is None else [draw.axis]
    d, h, w = (mm * factor if axis in chosen else mm for axis, mm in enumerate(spacing))
    old = volume.geometry.array_shape
    new = resampled_shape(old, spacing, (d, h, w))
    image = resample_image(volume.array, new, spacing)
    # The outer faces stay in place, so the first voxel's middle moves.
    ratio = np.divide(old, new)
    step = np.eye(4)
    step[:3, :3], step[:3, 3] = np.diag(ratio), (ratio - 1) / 2
    return _on_grid(image, resample_label(label.array, new), volume.geometry, step)


def _orientation(volume: Volume, label: LabelMap, number: float, _: Draw) -> Placed:
    """Store the same voxels in another order, and read them again."""
    orientations = nib.orientations
    affine = np.array(volume.geometry.affine)
    wanted = orientations.axcodes2ornt(FRAMES[round(number) - 1])
    turn = orientations.ornt_transform(orientations.io_orientation(affine), wanted)

    def stored(array_DHW: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(orientations.apply_orientation(volume.geometry.turn_back(array_DHW), turn))

    turned = affine @ orientations.inv_ornt_aff(turn, volume.geometry.shape)
    geometry = Geometry.of(stored(label.array).shape, turned, volume.geometry.orientation)
    channels = [geometry.turn(stored(channel)) for channel in volume.array]
    return Volume(np.stack(channels), geometry), LabelMap(geometry.turn(stored(label.array)), geometry)


def _field_of_view(volume: Volume, label: LabelMap, share: float, draw: Draw) -> Placed:
    """Keep a box around what is labelled, with whole structures, a little to one side as people set it."""
    box = []
    drift = draw.case.uniform(-1, 1, 3)
    for axis, size in enumerate(label.array.shape):
        filled = np.flatnonzero((label.array > 0).any(axis=tuple(other for other in range(3) if other != axis)))
        first, last = (int(filled[0]), int(filled[-1]) + 1) if filled.size else (size // 2, size // 2)
        keep = max(1, round(size * share), last - first)
        centred = (first + last - keep) / 2 + drift[axis] * 0.25 * (size - keep)
        start = int(np.clip(round(centred), max(0, last - keep), min(first, size - keep)))
        box.append(slice(start, start + keep))
    step = np.eye(4)
    step[:3, 3] = [part.start for part in box]
    return _on_grid(volume.array[:, *box], label.array[tuple(box)], volume.geometry, step)


def _pose(volume: Volume, label: LabelMap, degrees: float, draw: Draw) -> Placed:
    """Turn about a random axis through the middle, and shift; in mm, so that coarse axes do not shear."""
    axis, shift = (vector / np.linalg.norm(vector) for vector in draw.case.normal(size=(2, 3)))
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.deg2rad(degrees)
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    spacing = np.array(volume.spacing)
    matrix = turn * spacing[None, :] / spacing[:, None]
    middle = (np.array(label.array.shape) - 1) / 2
    offset = middle - matrix @ middle + shift * degrees / 5

    def moved(array: NDArray[Any], mode: Literal["nearest", "constant"]) -> NDArray[np.float32]:
        return np.asarray(ndimage.affine_transform(array.astype(np.float32), matrix, offset, order=1, mode=mode))

    image = np.stack([moved(channel, "nearest") for channel in volume.array])
    found, best = np.zeros_like(label.array), moved(label.array == 0, "nearest")
    for value in np.unique(label.array[label.array > 0]):
        share = moved(label.array == value, "constant")
        found[share > best] = value
        best = np.maximum(best, share)
    return Volume(image, volume.geometry), LabelMap(found, label.geometry)


_CHANGES: dict[str, Callable[[Volume, LabelMap, float, Draw], Placed]] = {
    "coarser": _coarser,
    "orientation": _orientation,
    "field-of-view": _field_of_view,
    "pose": _pose,
}


def _on_grid(image: NDArray[np.float32], label: NDArray[Any], old: Geometry, step: NDArray[np.float64]) -> Placed:
    """Arrays on a grid whose index `(d, h, w, 1)` is `step @` that of the old one, stored in the array's own order."""
    affine = (old.array_affine @ step)[:, [2, 1, 0, 3]]
    geometry = Geometry.of(label.shape[::-1], affine, old.orientation)
    return Volume(np.ascontiguousarray(image), geometry), LabelMap(np.ascontiguousarray(label), geometry)
