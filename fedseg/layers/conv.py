"""Convolutions that keep their input's memory layout, PyTorch's fast CPU path, and right gradients.

One fault of PyTorch (2.13) on a CPU: in bfloat16, the weight gradient of a 3D convolution with stride 1 holds uninitialised
memory, NaN now and then, where the volume has fewer slices than the kernel. `SafeConv3d` computes those in fp32.

Two habits of PyTorch on a CPU cost much time in 3D networks:

- A batch of one with `C * D * H <= 20480` is sent to a slow kernel, a rule that was made for images. `Conv3d` cuts such
  a volume into two overlapping halves and convolves them as a batch of two: the same sums, several times faster.
- A 1x1x1 convolution copies a channels-last tensor to channels-first and stays there. `Pointwise` multiplies matrices.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SLOW_BELOW = 20480
_is_exporting = getattr(
    torch.compiler, "is_exporting", torch.compiler.is_compiling
)  # torch 2.5 and 2.6 cannot tell them apart


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of `(B, C, ...)` are next to each other in memory."""
    return x.stride(1) == 1


def in_channels_last(x: Tensor) -> Tensor:
    """The same values with neighbouring channels.

    Unlike `contiguous(memory_format=...)`, this also sets the strides of a single channel, which later layers look at.
    """
    x = x.movedim(1, -1)
    return x.reshape(-1).view(x.shape).movedim(-1, 1)


def like(y: Tensor, x: Tensor) -> Tensor:
    """`y` in the layout of `x`; convolutions of a single channel lose it."""
    if is_channels_last(x):
        return y if is_channels_last(y) else in_channels_last(y)
    return y.contiguous() if is_channels_last(y) else y


class SafeConv3d(nn.Conv3d):
    """A convolution whose bfloat16 gradients are right on a CPU too."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.device.type != "cpu" or x.shape[2] >= self.kernel_size[0] or not _in_bfloat16(x):
            y: Tensor = super()._conv_forward(x, weight, bias)
            return y
        with torch.autocast("cpu", enabled=False):
            y = super()._conv_forward(x.float(), weight.float(), None if bias is None else bias.float())
        return y.bfloat16()


def make_safe(network: nn.Module) -> nn.Module:
    """Turn the plain 3D convolutions of a network that is not ours into safe ones; nothing else changes."""
    for module in network.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = SafeConv3d
    return network


class Conv3d(SafeConv3d):
    """A 3x3x3 convolution, stride 1, padding 1, no bias."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Convolve `(B, C, D, H, W)`."""
        if not _is_exporting() and _takes_the_slow_path(x_BCDHW):
            return like(_convolve_halves(x_BCDHW, self.weight), x_BCDHW)
        return like(super().forward(x_BCDHW), x_BCDHW)


class Pointwise(nn.Module):
    """A 1x1 convolution of images or 1x1x1 of volumes; `weight` has a convolution's shape.

    Args:
        in_channels: input channels.
        out_channels: output channels.
        dims: 2 for images, 3 for volumes.
        bias: add one.
    """

    def __init__(self, in_channels: int, out_channels: int, *, dims: int = 3, bias: bool = False) -> None:
        super().__init__()
        convolution = (nn.Conv2d if dims == 2 else nn.Conv3d)(in_channels, out_channels, 1, bias=bias)
        self.weight = convolution.weight
        self.bias = convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels of `(B, C, ...)`."""
        return mix_channels(x, self.weight, self.bias)


def mix_channels(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply the 1x1(x1) convolution `weight` `(O, C, 1, 1[, 1])` to `(B, C, ...)`."""
    if is_channels_last(x):
        return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    return (F.conv2d if x.dim() == 4 else F.conv3d)(x, weight, bias)


def _in_bfloat16(x: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype == torch.bfloat16


def _takes_the_slow_path(x_BCDHW: Tensor) -> bool:
    return (
        x_BCDHW.shape[0] == 1
        and x_BCDHW.device.type == "cpu"
        and x_BCDHW.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x_BCDHW.shape[1] * x_BCDHW.shape[2] * x_BCDHW.shape[3] <= _SLOW_BELOW
        and max(x_BCDHW.shape[2:]) > 1
    )


def _convolve_halves(x_BCDHW: Tensor, weight: Tensor) -> Tensor:
    """Convolve the two halves along the longest axis, each with one voxel of its neighbour, as a batch of two."""
    length = max(x_BCDHW.shape[2:])
    axis = 2 + list(x_BCDHW.shape[2:]).index(length)
    half = (length + 1) // 2
    border = [0, 0, 0, 0, 0, 0]
    border[2 * (4 - axis)], border[2 * (4 - axis) + 1] = 1, 1 + 2 * half - length
    padded = F.pad(x_BCDHW, border)
    halves = torch.cat([padded.narrow(axis, 0, half + 2), padded.narrow(axis, half, half + 2)])
    y = F.conv3d(halves, weight, padding=[0 if axis == 2 + i else 1 for i in range(3)])
    return torch.cat([y[:1], y[1:].narrow(axis, 0, length - half)], dim=axis)
