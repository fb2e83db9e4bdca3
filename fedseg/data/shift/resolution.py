"""Resolution: thick slices, coarse matrices, soft and sharp kernels, all without moving the image.

Slices are averages over slabs that divide the field of view, and come back by linear interpolation between their middles: one
matrix along each axis. (MONAI's low resolution moves the image by half a voxel against its label.)
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedseg.data.shift.draw import Draw

Field3D = NDArray[np.float32]


def thick_slices(image: Field3D, factor: float, draw: Draw) -> Field3D:
    """Average over slices `factor` voxels thick along the site's axis."""
    return _through_slabs(image, factor, draw.pick_axis())


def low_resolution(image: Field3D, factor: float, draw: Draw) -> Field3D:
    """The same along all axes, or along the profile's."""
    for axis in range(3) if draw.axis is None else [draw.axis]:
        image = _through_slabs(image, factor, axis)
    return image


def blur(image: Field3D, sigma: float, _: Draw) -> Field3D:
    """A Gaussian."""
    return np.asarray(ndimage.gaussian_filter(image, sigma, mode="nearest"), dtype=np.float32)


def sharp_kernel(image: Field3D, amount: float, _: Draw) -> Field3D:
    """Add the detail that a Gaussian of one voxel takes away, in every axial slice."""
    smooth = ndimage.gaussian_filter(image, (0, 1, 1), mode="nearest")
    return np.asarray(image + np.float32(amount) * (image - smooth), dtype=np.float32)


def _through_slabs(image: Field3D, factor: float, axis: int) -> Field3D:
    size = image.shape[axis]
    return np.asarray(np.moveaxis(np.tensordot(_slabs(size, factor), image, (1, axis)), 0, axis), dtype=np.float32)


def _slabs(size: int, factor: float) -> Field3D:
    """`(size, size)`: voxels to slab means and back."""
    count = max(1, round(size / factor))
    edges = np.linspace(0, size, count + 1)
    voxel = np.arange(size)
    overlap = np.minimum(edges[1:, None], voxel + 1) - np.maximum(edges[:-1, None], voxel)
    mean = np.clip(overlap, 0, None) / (size / count)
    middles = (edges[1:] + edges[:-1]) / 2
    back = np.stack([np.interp(voxel + 0.5, middles, row) for row in np.eye(count)], axis=1)
    return np.asarray(back @ mean, dtype=np.float32)
