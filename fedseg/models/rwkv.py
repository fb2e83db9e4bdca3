"""RWKV-UNet: a U-shaped network of inverted residual blocks that sees the whole image through RWKV's linear attention.

Source: Jiang et al., "RWKV-UNet: Improving UNet with Long-Range Cooperation for Effective Medical Image Segmentation",
arXiv 2501.08458. The presets `t`, `s` and `b` of the two-dimensional network reproduce the released ones tensor for tensor,
and `fedseg.models.load_published` reads their weights; `RWKVUNet3d` is this project's own extension to volumes.

A stem at full resolution, then four stages, each halving the grid. The two coarse stages mix their tokens with Bi-WKV.
The channel mix (CCM) exchanges information between the scales of the skips; the decoder's blocks have large kernels.

What was wrong with the released code, and what is done here:

| fault | answer |
| --- | --- |
| unused attention, norms and a classifier in every checkpoint | nothing is built that gets no gradient |
| Bi-WKV off by one, CUDA only, at most 1024 tokens | the published equation, everywhere, of any length: `fedseg.layers.kernels` |
| square inputs of one size, divisible by 16 | any size: padded evenly, logits cropped; sizes are taken from the tensors |
| `in_channels` without effect | one channel is repeated to three, three pass, else the stem is built for as many |
| CCM resizes before it projects | it projects first and resizes fewer channels: the same up to rounding |
| slice after slice in evaluation, batch 1 | the slices of a volume are one batch |
| batch norm only | `norm="instance"` or `"group"` |
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedseg.layers.conv import Pointwise, SafeConv3d, in_channels_last
from fedseg.layers.drop_path import DropPath
from fedseg.layers.norm import ChannelNorm, Norm, make_norm
from fedseg.layers.padding import Size, crop, margin_for, pad
from fedseg.layers.rwkv import ChannelMix, SpatialMix, raster_orders

Axis = Literal["D", "H", "W"]
EPS = 1e-6
STRIDE = 16
"""Pixels of the input per pixel of the coarsest stage, along each axis."""


class RWKVUNet(nn.Module):
    """The network, arXiv 2501.08458, applied to the slices of volumes.

    Args:
        in_channels: channels of the input. One is repeated to three, as in the released network.
        num_labels: output channels, background included.
        patch_size: not needed, any size will do.
        depths: blocks per stage.
        widths: channels per stage.
        expansions: hidden over outer width of the blocks of each stage; doubled for a stage's first block.
        stem_width: channels at full resolution.
        kernel: size of the encoder's depth-wise convolutions, odd.
        decoder_kernel: size of the decoder's depth-wise convolutions, odd.
        drop_path: stochastic depth of the last block, growing linearly from none at the first.
        norm: of the convolutions; `batch` (released network) needs larger batches than the others.
        slice_axis: along which a volume is cut into slices.
        memory_format: layout of activations, the same numbers up to rounding; `auto` is `channels_last`.
        deep_supervision: not needed, there is one output.
    """

    deep_supervision = False
    deep_supervision_weights = (1.0,)
    dims = 2

    def __init__(
        self,
        in_channels: int,
        num_labels: int,
        patch_size: Size,  # noqa: ARG002
        *,
        depths: Sequence[int] = (2, 2, 4, 2),
        widths: Sequence[int] = (32, 48, 96, 160),
        expansions: Sequence[float] = (2, 2.5, 3, 3.5),
        stem_width: int = 24,
        kernel: int = 5,
        decoder_kernel: int = 9,
        drop_path: float = 0.05,
        norm: Norm = "batch",
        slice_axis: Axis = "D",
        memory_format: Literal["auto", "contiguous", "channels_last"] = "auto",
        deep_supervision: bool = False,  # noqa: ARG002
    ) -> None:
        super().__init__()
        self.slice_axis: int | None = "DHW".index(slice_axis)
        self.memory_format = memory_format
        self.repeat_channel = in_channels == 1
        layers = _Layers(self.dims, norm)

        self.stem = Stem(3 if self.repeat_channel else in_channels, stem_width, kernel, layers)
        self.stages = nn.ModuleList()
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        before = stem_width
        orders = itertools.cycle(raster_orders(3) if self.dims == 3 else [(0, 1)])
        for stage, (depth, width, expansion) in enumerate(zip(depths, widths, expansions, strict=True)):
            attends = stage >= len(depths) - 2
            blocks: list[nn.Module] = [DownBlock(before, width, int(before * 2 * expansion), kernel, layers, attends)]
            next(rates)
            for _ in range(1, depth):
                mix = SpatialMix(int(width * expansion), next(orders)) if attends else None
                blocks.append(Block(width, int(width * expansion), kernel, layers, mix, next(rates)))
            self.stages.append(nn.Sequential(*blocks))
            before = width

        self.ccm = CrossChannelMix(widths[-2::-1], layers, drop_path)
        outs = [stem_width, *widths[:-1]][::-1]
        ins = [widths[-1], *(2 * width for width in widths[-2::-1])]
        self.decoder = nn.ModuleList(
            UpBlock(channels, out, decoder_kernel, layers) for channels, out in zip(ins, outs, strict=True)
        )
        self.head = layers.pointwise(stem_width, num_labels, bias=True)

    def forward(self, image_BCDHW: Tensor) -> Tensor:
        """Segment a batch of volumes of any size, slice by slice: logits `(B, K, D, H, W)`."""
        axis = self.slice_axis or 0
        multiple = [1 if i == axis else STRIDE for i in range(3)]
        margin = margin_for(_size(image_BCDHW), (multiple[0], multiple[1], multiple[2]))
        x = pad(image_BCDHW, margin).movedim(2 + axis, 1)
        logits_NKHW = self._segment(x.flatten(0, 1))
        return crop(logits_NKHW.view(*x.shape[:2], *logits_NKHW.shape[1:]).movedim(1, 2 + axis), margin)

    def _segment(self, x: Tensor) -> Tensor:
        """Logits of `(B, C, ...)`, whose grid must be a multiple of the stride."""
        if self.repeat_channel:
            x = x.expand(-1, 3, *x.shape[2:])
        x = x.contiguous() if self.memory_format == "contiguous" else in_channels_last(x)
        x = self.stem(x)
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        mixed = self.ccm(skips[-2::-1])
        for up, skip in zip(self.decoder, [*mixed, None], strict=True):
            x = up(x) if skip is None else torch.cat([up(x), skip], dim=1)
        logits: Tensor = self.head(x)
        return logits


class RWKVUNet3d(RWKVUNet):
    """The same blocks over the voxels of a volume; this project's extension of arXiv 2501.08458.

    The shift has six directions, and each block's tokens are put in a row along another axis than the block's before, so
    that neighbours along every axis are neighbours for some block. Bi-WKV itself knows nothing of dimensions.

    Args:
        in_channels: channels of the input.
        num_labels: output channels, background included.
        patch_size: not needed, any size will do.
        options: those of `RWKVUNet` but `slice_axis`.
    """

    dims = 3

    def __init__(self, in_channels: int, num_labels: int, patch_size: Size, **options: Any) -> None:
        super().__init__(in_channels, num_labels, patch_size, **options)
        self.slice_axis = None

    def forward(self, image_BCDHW: Tensor) -> Tensor:
        """Segment a batch of volumes of any size: logits `(B, K, D, H, W)`."""
        margin = margin_for(_size(image_BCDHW), (STRIDE, STRIDE, STRIDE))
        return crop(self._segment(pad(image_BCDHW, margin)), margin)


class _Layers:
    """Makes the layers of an image network (`dims=2`) or of a volume network (`dims=3`)."""

    def __init__(self, dims: int, norm: Norm) -> None:
        self.dims = dims
        self._norm = norm

    def norm(self, channels: int) -> nn.Module:
        return make_norm(self._norm, channels, self.dims, eps=EPS)

    def pointwise(self, channels: int, out: int, *, bias: bool = False) -> Pointwise:
        return Pointwise(channels, out, dims=self.dims, bias=bias)

    def depthwise(self, channels: int, kernel: int, stride: int = 1) -> nn.Module:
        convolution = nn.Conv2d if self.dims == 2 else SafeConv3d
        return convolution(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)

    def resize(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(
            x, size=list(size), mode="bilinear" if self.dims == 2 else "trilinear", align_corners=False
        )


class Stem(nn.Module):
    """From the input to `width` channels at full resolution, with squeeze and excitation."""

    def __init__(self, channels: int, width: int, kernel: int, layers: _Layers) -> None:
        super().__init__()
        self.expand, self.expand_norm = layers.pointwise(channels, channels), layers.norm(channels)
        self.local, self.local_norm = layers.depthwise(channels, kernel), layers.norm(channels)
        self.squeeze, self.excite = (layers.pointwise(channels, channels, bias=True) for _ in range(2))
        self.project = layers.pointwise(channels, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, ...)` to `(B, width, ...)`."""
        y = F.relu(self.expand_norm(self.expand(x)))
        y = F.silu(self.local_norm(self.local(y)))
        mean = y.mean(dim=tuple(range(2, y.dim())), keepdim=True)
        y = y * torch.sigmoid(self.excite(F.silu(self.squeeze(mean))))
        z: Tensor = self.project(y)
        return z


class DownBlock(nn.Module):
    """First block of a stage: halves the grid; no residual, no attention.

    Args:
        channels: input width.
        out: output width.
        hidden: width between.
        kernel: of the depth-wise convolution.
        layers: makes them.
        by_token: normalise the input over its channels, else with the network's norm.
    """

    def __init__(self, channels: int, out: int, hidden: int, kernel: int, layers: _Layers, by_token: bool) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, eps=EPS) if by_token else layers.norm(channels)
        self.expand, self.expand_norm = layers.pointwise(channels, hidden), layers.norm(hidden)
        self.local, self.local_norm = layers.depthwise(hidden, kernel, stride=2), layers.norm(hidden)
        self.project = layers.pointwise(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, ...)` to `(B, out, ...)` on half the grid."""
        y = F.relu(self.expand_norm(self.expand(self.norm(x))))
        z: Tensor = self.project(F.silu(self.local_norm(self.local(y))))
        return z


class Block(nn.Module):
    """Further block of a stage: an inverted residual, with a spatial mix in the coarse stages.

    Args:
        channels: width of input and output.
        hidden: width between.
        kernel: of the depth-wise convolution.
        layers: makes them.
        mix: spatial mix of the hidden features; None: there is none.
        drop_path: probability that a branch is left out.
    """

    def __init__(
        self, channels: int, hidden: int, kernel: int, layers: _Layers, mix: SpatialMix | None, drop_path: float
    ) -> None:
        super().__init__()
        self.norm = layers.norm(channels) if mix is None else ChannelNorm(channels, eps=EPS)
        self.expand, self.expand_norm = layers.pointwise(channels, hidden), layers.norm(hidden)
        self.mix = mix
        self.mix_norm = None if mix is None else nn.LayerNorm(hidden)
        self.local, self.local_norm = layers.depthwise(hidden, kernel), layers.norm(hidden)
        self.project = layers.pointwise(hidden, channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Refine `(B, C, ...)`."""
        y = F.relu(self.expand_norm(self.expand(self.norm(x))))
        if self.mix is not None and self.mix_norm is not None:
            mixed = self.mix_norm(self.mix(y.movedim(1, -1))).movedim(-1, 1)
            y = y + self.drop_path(mixed)
        z = y + F.silu(self.local_norm(self.local(y)))
        refined: Tensor = x + self.drop_path(self.project(z))
        return refined


class CrossChannelMix(nn.Module):
    """CCM: brings the skips of all scales to the finest grid, mixes their channels there, and sends them back.

    A 1x1 convolution and a linear resize commute, so that each skip is projected before it grows, and shrunk before it is
    projected back.

    Args:
        widths: channels of the skips, coarsest first.
        layers: makes them.
        drop_path: probability that the mix is left out.
    """

    def __init__(self, widths: Sequence[int], layers: _Layers, drop_path: float) -> None:
        super().__init__()
        width = widths[-1]
        self.enter = nn.ModuleList(layers.pointwise(channels, width, bias=True) for channels in widths)
        self.mix = ChannelMix(width * len(widths))
        self.norm = nn.LayerNorm(width * len(widths))
        self.drop_path = DropPath(drop_path)
        self.leave = nn.ModuleList(layers.pointwise(width, channels, bias=True) for channels in widths)
        self._layers = layers

    def forward(self, skips: Sequence[Tensor]) -> list[Tensor]:
        """Mix skips `(B, C, ...)`, coarsest first; shapes stay."""
        resize, finest = self._layers.resize, skips[-1].shape[2:]
        z = torch.cat([resize(enter(x), finest) for enter, x in zip(self.enter, skips, strict=True)], dim=1)
        z = z + self.drop_path(self.norm(self.mix(z.movedim(1, -1))).movedim(-1, 1))
        parts = z.chunk(len(skips), dim=1)
        return [leave(resize(p, x.shape[2:])) for leave, p, x in zip(self.leave, parts, skips, strict=True)]


class UpBlock(nn.Module):
    """Decoder block: doubles the grid at its end.

    Args:
        channels: input width.
        out: output width.
        kernel: of the depth-wise convolution.
        layers: makes them.
    """

    def __init__(self, channels: int, out: int, kernel: int, layers: _Layers) -> None:
        super().__init__()
        self.expand, self.expand_norm = layers.pointwise(channels, channels), layers.norm(channels)
        self.local, self.local_norm = layers.depthwise(channels, kernel), layers.norm(channels)
        self.project, self.project_norm = layers.pointwise(channels, out), layers.norm(out)
        self._layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, ...)` to `(B, out, ...)` on twice the grid."""
        y = F.relu(self.expand_norm(self.expand(x)))
        y = F.silu(self.local_norm(self.local(y)))
        y = F.relu(self.project_norm(self.project(y)))
        return self._layers.resize(y, [2 * length for length in y.shape[2:]])


def _size(x_BCDHW: Tensor) -> Size:
    return x_BCDHW.shape[2], x_BCDHW.shape[3], x_BCDHW.shape[4]
