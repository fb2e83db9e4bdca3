"""NIfTI files as arrays: read, turned to one orientation, checked, and written back where they came from.

Arrays are `(C, D, H, W)`: a file's `(x, y, z)` axes are turned to the asked orientation (`RAS` unless said otherwise)
and reversed, so that D runs along S, H along A and W along R. The `Geometry` of the file allows the exact way back.
"""

import gzip
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import ArrayLike, NDArray

from fedseg.data.reasons import Reason
from fedseg.errors import CaseError

Shape3D = tuple[int, int, int]
Spacing = tuple[float, float, float]
Row = tuple[float, float, float, float]
Affine = tuple[Row, Row, Row, Row]

SPACING_LIMITS = (0.01, 50.0)
"""Plausible voxel spacing in mm; anything else is a wrong unit or a broken header."""

_CHUNK = 1 << 20

_READ_ERRORS = (
    OSError,
    EOFError,
    zlib.error,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    MemoryError,
    ImageFileError,
    HeaderDataError,
)


@dataclass(frozen=True)
class Geometry:
    """Where a file's voxels lie, and to which orientation its array was turned."""

    shape: Shape3D
    """Size of the file in voxels, `(x, y, z)`."""
    affine: Affine
    """File voxel `(x, y, z)` to scanner coordinates in mm."""
    orientation: str = "RAS"
    """Axis codes of the array, in `(W, H, D)` order."""

    @classmethod
    def of(cls, shape: Sequence[int], affine: ArrayLike, orientation: str) -> Self:
        """The same from any numbers: three for the shape, `(4, 4)` for the affine."""
        x, y, z = (int(size) for size in shape)
        rows: list[Row] = [(a, b, c, d) for a, b, c, d in np.asarray(affine, dtype=np.float64).tolist()]
        first, second, third, last = rows
        return cls((x, y, z), (first, second, third, last), orientation)

    @property
    def array_shape(self) -> Shape3D:
        """Size of the turned array, `(D, H, W)`."""
        axes = [int(axis) for axis in self._turn()[:, 0]]
        size = [0, 0, 0]
        for file_axis, array_axis in enumerate(axes):
            size[array_axis] = self.shape[file_axis]
        return (size[2], size[1], size[0])

    @property
    def array_affine(self) -> NDArray[np.float64]:
        """Array index `(d, h, w)` to scanner coordinates in mm, `(4, 4)`."""
        turned = np.array(self.affine) @ nib.orientations.inv_ornt_aff(self._turn(), self.shape)
        return np.asarray(turned[:, [2, 1, 0, 3]], dtype=np.float64)

    @property
    def spacing(self) -> Spacing:
        """Distance of neighbouring voxels in mm, `(D, H, W)`."""
        depth, height, width = np.linalg.norm(self.array_affine[:3, :3], axis=0)
        return (float(depth), float(height), float(width))

    def turn(self, file_array: NDArray[Any]) -> NDArray[Any]:
        """A file's `(x, y, z)` array as `(D, H, W)`."""
        turned = nib.orientations.apply_orientation(file_array, self._turn())
        return np.ascontiguousarray(turned.transpose(2, 1, 0))

    def turn_back(self, array: NDArray[Any]) -> NDArray[Any]:
        """A `(D, H, W)` array as the file's `(x, y, z)`; the inverse of `turn`."""
        back = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt(self.orientation), nib.orientations.io_orientation(np.array(self.affine))
        )
        return np.ascontiguousarray(nib.orientations.apply_orientation(array.transpose(2, 1, 0), back))

    def _turn(self) -> NDArray[np.float64]:
        turn: NDArray[np.float64] = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(np.array(self.affine)), nib.orientations.axcodes2ornt(self.orientation)
        )
        return turn


@dataclass(frozen=True)
class Volume:
    """An image in memory."""

    array: NDArray[np.float32]
    """Intensities `(C, D, H, W)`."""
    geometry: Geometry

    @property
    def spacing(self) -> Spacing:
        """Voxel spacing in mm, `(D, H, W)`."""
        return self.geometry.spacing

    @property
    def affine(self) -> NDArray[np.float64]:
        """Array index `(d, h, w)` to scanner coordinates in mm, `(4, 4)`."""
        return self.geometry.array_affine


@dataclass(frozen=True)
class LabelMap:
    """A segmentation in memory."""

    array: NDArray[np.uint8] | NDArray[np.uint16]
    """Label values `(D, H, W)`."""
    geometry: Geometry


def read_image(paths: tuple[Path, ...], orientation: str = "RAS") -> Volume:
    """Read a case's image: one file per channel, or files whose fourth axis is channels.

    Args:
        paths: the case's files in channel order.
        orientation: axis codes to which the array is turned.

    Raises:
        CaseError: a file is missing, unreadable, not finite, constant, or the files do not lie on one grid.
    """
    if not paths:
        raise CaseError(Reason.MISSING_IMAGE, "the case has no image file")
    channels: list[NDArray[np.float32]] = []
    first: Geometry | None = None
    for path in paths:
        data, geometry = _read(path, Reason.MISSING_IMAGE, orientation)
        first = first or geometry
        require_same_grid(first, geometry, f"{paths[0]} and {path}")
        channels += [geometry.turn(data[..., channel]) for channel in range(data.shape[3])]
    assert first is not None
    for number, channel in enumerate(channels):
        if not np.isfinite(channel).all():
            raise CaseError(Reason.NON_FINITE, f"{paths[0]}: channel {number} holds NaN or infinite values")
        if channel.min() == channel.max():
            raise CaseError(Reason.CONSTANT_IMAGE, f"{paths[0]}: channel {number} is {channel.flat[0]:g} everywhere")
    return Volume(np.stack(channels), first)


def read_label(path: Path | None, orientation: str = "RAS") -> LabelMap:
    """Read a segmentation; whole numbers stored as floats are accepted.

    Raises:
        CaseError: the file is missing, unreadable, not 3D, or holds values that are no label.
    """
    if path is None:
        raise CaseError(Reason.MISSING_LABEL, "the case has no label file")
    data, geometry = _read(path, Reason.MISSING_LABEL, orientation)
    if data.shape[3] != 1:
        raise CaseError(Reason.SHAPE_MISMATCH, f"{path}: a label must be 3D, got {data.shape[3]} volumes in one file")
    if not np.isfinite(data).all():
        raise CaseError(Reason.NON_FINITE, f"{path}: the label holds NaN or infinite values")
    whole = np.rint(data[..., 0])
    if np.abs(whole - data[..., 0]).max() > 1e-3:
        raise CaseError(Reason.UNKNOWN_LABEL, f"{path}: the label holds values that are no whole numbers")
    lowest, highest = float(whole.min()), float(whole.max())
    if lowest < 0 or highest > np.iinfo(np.uint16).max:
        raise CaseError(Reason.UNKNOWN_LABEL, f"{path}: values run from {lowest:g} to {highest:g}, labels from 0")
    return LabelMap(geometry.turn(whole.astype(np.uint8 if highest < 256 else np.uint16)), geometry)


def write_label(path: Path, label_DHW: NDArray[Any], geometry: Geometry) -> None:
    """Write a segmentation on the grid of the file that `geometry` describes, aside and then renamed.

    Args:
        path: ends in `.nii` or `.nii.gz`.
        label_DHW: label values `(D, H, W)`, turned as `geometry` says.
        geometry: of the image that was segmented.
    """
    if label_DHW.shape != geometry.array_shape:
        raise ValueError(f"label is {label_DHW.shape}, the image's grid is {geometry.array_shape}")
    dtype = np.uint8 if label_DHW.size == 0 or label_DHW.max() < 256 else np.uint16
    image = nib.Nifti1Image(geometry.turn_back(label_DHW).astype(dtype), np.array(geometry.affine))
    image.header.set_xyzt_units("mm")
    image.set_sform(np.array(geometry.affine), code=1)
    image.set_qform(np.array(geometry.affine), code=1)
    save_aside(image, path)


def save_aside(image: Any, path: Path) -> None:
    """Save a nibabel image so that `path` is either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = ".nii.gz" if path.name.endswith(".gz") else ".nii"
    aside = path.with_name(f".{os.getpid()}-{path.name.removesuffix(suffix)}.part{suffix}")
    try:
        nib.save(image, aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def require_same_grid(one: Geometry, other: Geometry, which: str) -> None:
    """Check that two files have the same size and lie at the same place, to a tenth of a voxel.

    Raises:
        CaseError: they do not; `which` names the two.
    """
    if one.shape != other.shape:
        raise CaseError(Reason.SHAPE_MISMATCH, f"{which} differ in size: {one.shape} and {other.shape}")
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in one.shape], [1], indexing="ij")).reshape(4, -1)
    apart = float(np.abs((np.array(one.affine) - np.array(other.affine)) @ corners).max())
    if apart > 0.1 * min(one.spacing):
        raise CaseError(Reason.AFFINE_MISMATCH, f"{which} lie up to {apart:.3g} mm apart in the scanner's frame")


def _read(path: Path, missing: Reason, orientation: str) -> tuple[NDArray[np.float32], Geometry]:
    """The file's values as `(x, y, z, C)` and its geometry."""
    if not path.is_file():
        raise CaseError(missing, f"{path}: no such file")
    try:
        if path.name.endswith(".gz"):
            _require_intact(path)
        image: Any = nib.load(path)
        affine = np.array(image.affine, dtype=np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            data = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged"))
    except _READ_ERRORS as error:
        raise CaseError(Reason.UNREADABLE, f"{path}: {type(error).__name__}: {error}") from error
    while data.ndim > 4 and 1 in data.shape[3:]:
        data = data.squeeze(axis=3 + data.shape[3:].index(1))
    if data.ndim == 3:
        data = data[..., None]
    if data.ndim != 4 or 0 in data.shape:
        raise CaseError(Reason.SHAPE_MISMATCH, f"{path}: needs x, y, z and perhaps channels, got {data.shape}")
    return data, _geometry(path, data.shape[:3], affine, orientation)


def _require_intact(path: Path) -> None:
    """Decompress to the end, where the checksum stands: nibabel stops before it and would miss most flipped bits."""
    with gzip.open(path) as stream:
        while stream.read(_CHUNK):
            pass


def _geometry(path: Path, shape: tuple[int, ...], affine: NDArray[np.float64], orientation: str) -> Geometry:
    low, high = SPACING_LIMITS
    if not np.isfinite(affine).all():
        _absurd(path, "the affine holds NaN or infinite values")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if (spacing < low).any() or (spacing > high).any():
        _absurd(path, f"voxel spacing is {[float(f'{s:.4g}') for s in spacing]} mm, plausible is {low} to {high}")
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3 or np.isnan(nib.orientations.io_orientation(affine)).any():
        _absurd(path, "the affine is singular: two axes point the same way")
    return Geometry.of(shape, affine, orientation)


def _absurd(path: Path, what: str) -> NoReturn:
    raise CaseError(Reason.ABSURD_SPACING, f"{path}: {what}")
