"""Pad a volume to the multiple that a network needs, and crop its logits back.

The padding repeats the border voxels: zero would be the mean of a z-scored MR volume but soft tissue in a CT window.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

Size = tuple[int, int, int]


class Margin(NamedTuple):
    """How a volume sits inside its padded copy, in voxels `(D, H, W)`."""

    size: Size
    """Size before padding."""
    before: Size
    """Voxels added before the first one."""
    after: Size
    """Voxels added behind the last one."""


def margin_for(size: Size, multiple: Size) -> Margin:
    """Split what is missing to the next multiple evenly; an odd voxel goes behind."""
    missing = tuple(-length % step for length, step in zip(size, multiple, strict=True))
    before = tuple(voxels // 2 for voxels in missing)
    after = tuple(voxels - front for voxels, front in zip(missing, before, strict=True))
    return Margin(size, (before[0], before[1], before[2]), (after[0], after[1], after[2]))


def pad(image_BCDHW: torch.Tensor, margin: Margin) -> torch.Tensor:
    """Surround a volume by copies of its border voxels."""
    if not any(margin.before) and not any(margin.after):
        return image_BCDHW
    (front, top, left), (back, bottom, right) = margin.before, margin.after
    return F.pad(image_BCDHW, (left, right, top, bottom, front, back), mode="replicate")


def crop(logits_BKDHW: torch.Tensor, margin: Margin, stride: Size = (1, 1, 1)) -> torch.Tensor:
    """Take from logits the part that belongs to the unpadded volume.

    Args:
        logits_BKDHW: logits of the padded volume, one voxel per `stride` input voxels.
        margin: where the volume sits.
        stride: `(D, H, W)`; where it does not divide the margin, the nearest coarse voxels are taken, so that a
            target resampled to their number is at most half a coarse voxel off.
    """
    if not any(margin.before) and not any(margin.after):
        return logits_BKDHW
    box = []
    for length, front, step, coarse in zip(margin.size, margin.before, stride, logits_BKDHW.shape[2:], strict=True):
        count = max(1, (2 * length + step) // (2 * step))
        start = min((2 * front + step) // (2 * step), coarse - count)
        box.append(slice(start, start + count))
    return logits_BKDHW[:, :, box[0], box[1], box[2]]
