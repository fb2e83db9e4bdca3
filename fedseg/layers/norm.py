"""Normalisation layers by name."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from fedseg.layers.conv import is_channels_last, like

Norm = Literal["batch", "instance", "group"]


class InstanceNorm(nn.Module):
    """Instance norm `(B, C, ...)` without running statistics.

    PyTorch's own gives wrong gradients on a CPU for a channels-last batch of one, and its group norm is slow there in that
    layout. So each sample takes the path of a batch norm of its own, which is right and fast.

    A sample of one voxel has no statistics: it becomes zero, plus the shift.

    Args:
        channels: C.
        affine: learn a scale and a shift.
        eps: added to the variance.
    """

    def __init__(self, channels: int, *, affine: bool, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels = channels
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each channel of each sample."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or not is_channels_last(x):
            return torch.group_norm(x, self.channels, self.weight, self.bias, self.eps)
        samples = [_batch_norm(one, self.weight, self.bias, self.eps) for one in x.chunk(x.shape[0])]
        return samples[0] if len(samples) == 1 else torch.cat(samples)


def _batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Batch norm with the statistics of `x`; unlike `functional.batch_norm`, it takes a single voxel, and gives the bias."""
    return torch.batch_norm(x, weight, bias, None, None, True, 0.0, eps, False)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel or voxel of `(B, C, ...)`."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each pixel or voxel; the memory layout stays."""
        return like(super().forward(x.movedim(1, -1)).movedim(-1, 1), x)


def make_norm(kind: Norm | None, channels: int, dims: int = 3, *, eps: float = 1e-5) -> nn.Module:
    """A normalisation layer of images (`dims=2`) or volumes; None is instance norm without parameters.

    Groups have four channels where that divides the width, else more.
    """
    if kind is None:
        return InstanceNorm(channels, affine=False, eps=eps)
    if kind == "instance":
        return InstanceNorm(channels, affine=True, eps=eps)
    if kind == "batch":
        return (nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d)(channels, eps=eps)
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 4)), channels, eps=eps)
