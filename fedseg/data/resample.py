"""Between voxel spacings: smooth for images, by structure for labels, both keeping the field of view."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedseg.data.volume import Shape3D, Spacing

ANISOTROPIC = 3.0
"""From this ratio of largest to smallest spacing on, interpolation is linear: cubic rings between thick slices."""


def resampled_shape(shape: Shape3D, spacing: Spacing, wanted: Spacing) -> Shape3D:
    """Voxels that cover the same field of view at `wanted` mm, `(D, H, W)`."""
    depth, height, width = (
        max(1, round(n * have / want)) for n, have, want in zip(shape, spacing, wanted, strict=True)
    )
    return (depth, height, width)


def resample_image(image_CDHW: NDArray[Any], shape: Shape3D, spacing: Spacing) -> NDArray[np.float32]:
    """Resample every channel to `shape`, cubic (linear if anisotropic), within the channel's own range.

    Args:
        image_CDHW: intensities.
        shape: voxels wanted, `(D, H, W)`.
        spacing: of the given image in mm, `(D, H, W)`.
    """
    order: Literal[1, 3] = 3 if max(spacing) / min(spacing) < ANISOTROPIC else 1
    return np.stack([_zoom_smooth(channel, shape, order) for channel in image_CDHW])


def resample_label(label_DHW: NDArray[Any], shape: Shape3D) -> NDArray[Any]:
    """Resample a segmentation: each structure's mask linearly, then the strongest structure of each voxel."""
    if label_DHW.shape == shape:
        return label_DHW
    result = np.zeros(shape, dtype=label_DHW.dtype)
    best = np.zeros(shape, dtype=np.float32)
    for value in np.unique(label_DHW):
        share = zoom(np.asarray(label_DHW == value, dtype=np.float32), shape, order=1)
        stronger = share > best
        result[stronger] = value
        best[stronger] = share[stronger]
    return result


def resample_probabilities(probabilities_KDHW: NDArray[Any], shape: Shape3D) -> NDArray[np.uint8]:
    """Resample class scores linearly and take the largest; one class at a time, so that memory stays small."""
    if probabilities_KDHW.shape[1:] == shape:
        return np.asarray(probabilities_KDHW.argmax(axis=0), dtype=np.uint8)
    result = np.zeros(shape, dtype=np.uint8)
    best = np.full(shape, -np.inf, dtype=np.float32)
    for value, scores in enumerate(probabilities_KDHW):
        score = zoom(np.asarray(scores, dtype=np.float32), shape, order=1)
        stronger = score > best
        result[stronger] = value
        best[stronger] = score[stronger]
    return result


def zoom(array_DHW: NDArray[Any], shape: Shape3D, order: Literal[0, 1, 3]) -> NDArray[Any]:
    """Spline interpolation that keeps the outer faces of the volume in place."""
    if array_DHW.shape == shape:
        return array_DHW
    factors = np.divide(shape, array_DHW.shape)
    return np.asarray(ndimage.zoom(array_DHW, factors, order=order, mode="nearest", grid_mode=True))


def _zoom_smooth(channel_DHW: NDArray[Any], shape: Shape3D, order: Literal[1, 3]) -> NDArray[np.float32]:
    channel = np.asarray(channel_DHW, dtype=np.float32)
    if channel.shape == shape:
        return channel
    shrink = [max(0.0, (old / new - 1) / 2) for new, old in zip(shape, channel.shape, strict=True)]
    smooth = ndimage.gaussian_filter(channel, shrink, mode="nearest") if any(shrink) else channel
    return np.asarray(np.clip(zoom(smooth, shape, order), channel.min(), channel.max()), dtype=np.float32)
