"""MLRU++: a U-shaped 3D network of residual convolutions with light attention and multi-scale blocks.

Source: Yadav, Rizk, Chen, Santosh, "MLRU++: Multiscale Lightweight Residual UNETR++ with Attention for Efficient 3D
Medical Image Segmentation", arXiv 2507.16122. The presets reproduce the released networks tensor for tensor, and
`fedseg.models.load_published` reads their weights.

A strided convolution makes a pyramid of `len(depths)` levels. Each level runs identical blocks: a position embedding,
LayerNorm, a light attention gate (LCBAM), a multi-scale depth-wise block (M2B), then 3D residual convolutions. The
decoder adds the encoder's features, and a convolutional skip brings the full resolution back.

In the released network LCBAM and M2B are two-dimensional: they see the voxels of a level in raster order, folded into a
nearly square image (`fold="2d"`). That mixes voxels that are no neighbours in the body; `fold="3d"` does not.

What was wrong with the released code, and what is done here:

| fault | answer |
| --- | --- |
| input size fixed by the position embeddings | they keep their grid and are resized tri-linearly; identity at home |
| sizes that no stride divides fail | the input is padded evenly, all logits are cropped |
| `in_channels` does not reach the stem | it does; one norm group per channel if that divides the width, else one |
| coupled width arguments | all widths follow from `base_width` |
| PyTorch's CPU gradients wrong at batch 1 | one dense layout throughout, see `_laid_out`; tested by differences |
| the fold mixes voxels, its tail dilutes means | kept for parity; else `fold="3d"`, `pool="masked"` |
| fold sizes break exporters | plain integers from the static grid; compile with `dynamic=False` |
| half precision underflows gamma | parameters stay fp32; use autocast |
| BatchNorm on small batches | `norm="instance"` or `"group"` |
| a position embedding in every block | `pos_embed="none"` |
| dead arguments and modules, scripts that do not run | do not exist here |
| two dropouts in the gate, decoder's other initialisation | kept, on purpose |
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fedseg.layers.conv import Conv3d, Pointwise, SafeConv3d, in_channels_last, is_channels_last, like, mix_channels
from fedseg.layers.norm import Norm, make_norm
from fedseg.layers.padding import Size, crop, margin_for, pad

MemoryFormat = Literal["auto", "contiguous", "channels_last"]


class MLRUPlusPlus(nn.Module):
    """The network, arXiv 2507.16122.

    Args:
        in_channels: channels of the input.
        num_labels: output channels, background included.
        patch_size: voxels `(D, H, W)` of the grid on which the position embeddings live.
        stem: kernel and stride of the first convolution.
        base_width: channels at full resolution; level `i` has `base_width * 2 ** (i + 1)`.
        depths: blocks per encoder level, finest first.
        decoder_depth: blocks per decoder level.
        n_res: residual convolution blocks inside each block.
        attn_dropout: element-wise dropout inside the attention gate.
        conv_dropout: channel dropout behind the residual convolutions.
        msd_kernels: sizes of the parallel depth-wise kernels, odd.
        fold: `2d` folds the voxels into an image (released network), `3d` keeps neighbours together.
        pool: `padded` counts the fold's zero tail in the gate's mean (released network), `masked` does not.
        pos_embed: `learned` per block (released network) or `none`.
        norm: of the blocks; `batch` (released network) needs larger batches than the others.
        gamma_init: start of the layer scale; 1e-6 (released network) leaves attention almost off at first.
        memory_format: layout of activations, the same numbers up to rounding; `channels_last` is much faster on a CPU,
            `auto` takes it there and `contiguous` elsewhere.
        checkpoint_activations: recompute activations in the backward pass: less memory, the same gradients.
        deep_supervision: build auxiliary heads on the two next coarser decoder levels.

    Attributes:
        deep_supervision: may be switched off (and on again, if the heads were built).
    """

    def __init__(
        self,
        in_channels: int,
        num_labels: int,
        patch_size: Size,
        *,
        stem: Size = (2, 4, 4),
        base_width: int = 16,
        depths: Sequence[int] = (3, 3, 3, 3),
        decoder_depth: int = 3,
        n_res: int = 2,
        attn_dropout: float = 0.1,
        conv_dropout: float = 0.1,
        msd_kernels: Sequence[int] = (1, 3, 5),
        fold: Literal["2d", "3d"] = "2d",
        pool: Literal["padded", "masked"] = "padded",
        pos_embed: Literal["learned", "none"] = "learned",
        norm: Norm = "batch",
        gamma_init: float = 1e-6,
        memory_format: MemoryFormat = "auto",
        checkpoint_activations: bool = False,
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        levels = len(depths)
        dims = 2 if fold == "2d" else 3
        widths = [base_width * 2 ** (level + 1) for level in range(levels)]
        self.strides = [_times(stem, 2**level) for level in range(levels)]
        self.memory_format = memory_format
        self.checkpoint_activations = checkpoint_activations

        def blocks(level: int, depth: int, *, encoder: bool) -> nn.ModuleList:
            grid = level_grid(patch_size, self.strides[-1], self.strides[level])
            return nn.ModuleList(
                Block(
                    widths[level],
                    grid if pos_embed == "learned" else None,
                    n_res=n_res,
                    attention=FoldedAttention(
                        LCBAM(widths[level], attn_dropout, dims=dims, std=0.02 if encoder else None),
                        M2B(widths[level], msd_kernels, norm, dims=dims, truncated=encoder),
                        masked=pool == "masked",
                    ),
                    norm=norm,
                    conv_dropout=conv_dropout,
                    gamma_init=gamma_init,
                )
                for _ in range(depth)
            )

        self.downs = nn.ModuleList()
        for before, after, step in zip([in_channels, *widths], widths, [stem, *[(2, 2, 2)] * levels], strict=False):
            groups = before if after % before == 0 else 1
            self.downs.append(
                nn.Sequential(nn.Conv3d(before, after, step, step, bias=False), nn.GroupNorm(groups, after))
            )
        self.encoder = nn.ModuleList(blocks(level, depth, encoder=True) for level, depth in enumerate(depths))
        self.skip = ResidualConv(in_channels, base_width, norm=None)

        self.ups = nn.ModuleList()
        for coarse, fine, step in zip(widths, [base_width, *widths], [stem, *[(2, 2, 2)] * levels], strict=False):
            self.ups.append(nn.ConvTranspose3d(coarse, fine, step, step, bias=False))
        self.decoder = nn.ModuleList(blocks(level, decoder_depth, encoder=False) for level in range(levels - 1))
        self.last = ResidualConv(base_width, base_width, norm=None)
        heads = min(3, levels) if deep_supervision else 1
        self.heads = nn.ModuleList(Pointwise(width, num_labels, bias=True) for width in [base_width, *widths][:heads])
        self.deep_supervision = heads > 1

    @property
    def deep_supervision_weights(self) -> tuple[float, ...]:
        """Weight of each output's loss, finest first: halved from head to head, summing to one."""
        weights = [0.5**head for head in range(len(self.heads) if self.deep_supervision else 1)]
        return tuple(weight / sum(weights) for weight in weights)

    def forward(self, image_BCDHW: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Segment a batch of volumes of any size.

        Args:
            image_BCDHW: preprocessed images.

        Returns:
            Logits `(B, K, D, H, W)`; while training with `deep_supervision`, a tuple of them, finest first, the coarser
            ones on the grids of their decoder levels.
        """
        margin = margin_for(_size(image_BCDHW), self.strides[-1])
        features = self._decode(self._as_laid_out(pad(image_BCDHW, margin)))
        if not (self.training and self.deep_supervision):
            return crop(self.heads[0](features[0]), margin)
        strides = [(1, 1, 1), *self.strides]
        return tuple(
            crop(head(feature), margin, stride)
            for head, feature, stride in zip(self.heads, features, strides, strict=False)
        )

    def _decode(self, image_BCDHW: Tensor) -> list[Tensor]:
        """Features at full resolution, then of every level but the coarsest, finest first."""
        x, skips = image_BCDHW, []
        for down, blocks in zip(self.downs, self.encoder, strict=True):
            x = like(down(x), x)
            x = self._run_all(blocks, x)
            skips.append(x)
        features: list[Tensor] = []
        for level in reversed(range(len(self.decoder))):
            x = self.ups[level + 1](x) + skips[level]
            x = self._run_all(self.decoder[level], x)
            features.insert(0, x)
        x = self.ups[0](x) + self._run(self.skip, image_BCDHW)
        return [self._run(self.last, x), *features]

    def _run_all(self, blocks: nn.Module, x: Tensor) -> Tensor:
        for block in blocks.children():
            x = self._run(block, x)
        return x

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if not (self.checkpoint_activations and self.training and torch.is_grad_enabled()):
            y: Tensor = block(x)
            return y
        recomputed: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=partial(_recomputation, block))
        return recomputed

    def _as_laid_out(self, image_BCDHW: Tensor) -> Tensor:
        """Choose the memory layout; everything behind follows its input."""
        last = self.memory_format == "channels_last" or (
            self.memory_format == "auto" and image_BCDHW.device.type == "cpu"
        )
        if not last:
            return image_BCDHW.contiguous()
        return in_channels_last(image_BCDHW)


class Block(nn.Module):
    """Position, gated multi-scale attention, residual convolutions; keeps its input's shape.

    Args:
        channels: width C.
        grid: grid `(D, H, W)` of the position embedding; None: there is none.
        n_res: residual convolution blocks.
        attention: what runs on the normalised voxels.
        norm: of the residual convolutions.
        conv_dropout: probability that a channel is dropped behind them.
        gamma_init: start of the layer scale.
    """

    def __init__(
        self,
        channels: int,
        grid: Size | None,
        *,
        n_res: int,
        attention: "FoldedAttention",
        norm: Norm,
        conv_dropout: float,
        gamma_init: float,
    ) -> None:
        super().__init__()
        self.position = None if grid is None else nn.Parameter(torch.zeros(1, channels, *grid))
        self.norm = nn.LayerNorm(channels)
        self.attention = attention
        self.gamma = nn.Parameter(torch.full((channels,), gamma_init))
        self.residual = nn.Sequential(*(ResidualConv(channels, channels, norm) for _ in range(n_res)))
        self.dropout = nn.Dropout3d(conv_dropout)
        self.project = Pointwise(channels, channels, bias=True)

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Refine the features of one level."""
        x = x_BCDHW if self.position is None else x_BCDHW + resize_position(self.position, _size(x_BCDHW))
        attended: Tensor = self.attention(self.norm(x.movedim(1, -1)), is_channels_last(x))
        x = x + self.gamma.view(-1, 1, 1, 1) * attended
        convolved: Tensor = self.project(self.dropout(self.residual(x)))
        return x + convolved


def resize_position(position_1CDHW: Tensor, grid: Size) -> Tensor:
    """Resample a position embedding tri-linearly; its own grid gives back the very same tensor."""
    if position_1CDHW.shape[2:] == grid:
        return position_1CDHW
    return F.interpolate(position_1CDHW, size=grid, mode="trilinear", align_corners=False)


class FoldedAttention(nn.Module):
    """LCBAM, then M2B, on voxels folded into an image, or on the volume itself if they are three-dimensional."""

    def __init__(self, gate: "LCBAM", scales: "M2B", *, masked: bool) -> None:
        super().__init__()
        self.gate = gate
        self.scales = scales
        self.masked = masked

    def forward(self, x_BDHWC: Tensor, channels_last: bool) -> Tensor:
        """Attend to the channels-last view of a volume, give back `(B, C, D, H, W)`.

        Args:
            x_BDHWC: normalised features.
            channels_last: memory layout of what the convolutions get.
        """
        batch, depth, rows, columns, channels = x_BDHWC.shape
        if self.gate.dims == 3:
            z_BCDHW: Tensor = self.scales(self.gate(_laid_out(x_BDHWC, channels_last)))
            return z_BCDHW
        tokens = depth * rows * columns
        height, width, tail = fold_shape(tokens)
        x_BNC: Tensor = x_BDHWC.reshape(batch, tokens, channels)
        if tail:
            x_BNC = F.pad(x_BNC, (0, 0, 0, tail))
        z_BCHW = _laid_out(x_BNC.reshape(batch, height, width, channels), channels_last)
        share = tokens / (height * width) if self.masked else 1.0
        z_BCHW = self.scales(self.gate(z_BCHW, filled=share))
        if channels_last:
            x_BNC = z_BCHW.movedim(1, -1).reshape(batch, height * width, channels)[:, :tokens]
            return x_BNC.reshape(batch, depth, rows, columns, channels).movedim(-1, 1)
        x_BCN: Tensor = z_BCHW.reshape(batch, channels, height * width)[:, :, :tokens]
        return x_BCN.reshape(batch, channels, depth, rows, columns)


def fold_shape(tokens: int) -> tuple[int, int, int]:
    """Height, width and number of empty pixels at the end of the nearly square image that holds `tokens` pixels."""
    height = math.isqrt(tokens)
    width = -(-tokens // height)
    return height, width, height * width - tokens


def _laid_out(x: Tensor, channels_last: bool) -> Tensor:
    """`(B, ..., C)` as `(B, C, ...)`.

    The strides are always those of a dense tensor, the batch's too. PyTorch's BatchNorm gives wrong gradients on a CPU
    if a batch of one carries another batch stride, as transposing and reshaping tokens leaves it; there is a test.
    """
    x = x.movedim(-1, 1)
    return x if channels_last else x.contiguous()


class LCBAM(nn.Module):
    """Light channel and spatial gate.

    Args:
        channels: width C.
        dropout: element-wise, after each of the two gates.
        dims: 2 for a folded image with a 7x7 spatial gate, 3 for a volume with 7x7x7.
        std: standard deviation of the initial weights; None: PyTorch's default, as the released decoder has it.
    """

    def __init__(self, channels: int, dropout: float, *, dims: int, std: float | None) -> None:
        super().__init__()
        self.dims = dims
        squeezed = max(4, channels // 16)
        self.squeeze = Pointwise(channels, squeezed, dims=dims)
        self.excite = Pointwise(squeezed, channels, dims=dims)
        self.spatial = (nn.Conv2d if dims == 2 else SafeConv3d)(2, 1, 7, padding=3, bias=False)
        self.dropout = nn.Dropout(dropout)
        if std is not None:
            for layer in (self.squeeze, self.excite, self.spatial):
                nn.init.trunc_normal_(layer.weight, std=std)

    def forward(self, z: Tensor, filled: float = 1.0) -> Tensor:
        """Gate `(B, C, h, w)` or `(B, C, D, H, W)`.

        Args:
            z: features; empty pixels are zero.
            filled: share of pixels over which the mean is taken.
        """
        mean = z.mean(dim=tuple(range(2, z.dim())), keepdim=True) / filled
        z = self.dropout(z * torch.sigmoid(self.excite(F.relu(self.squeeze(mean)))))
        maps = torch.cat([z.mean(dim=1, keepdim=True), z.amax(dim=1, keepdim=True)], dim=1)
        gated: Tensor = self.dropout(z * torch.sigmoid(self.spatial(maps)))
        return gated


class M2B(nn.Module):
    """Inverted bottleneck with parallel depth-wise convolutions of several sizes.

    Args:
        channels: width C; the bottleneck is twice as wide.
        kernels: sizes of the depth-wise kernels, odd.
        norm: behind every convolution.
        dims: 2 for a folded image, 3 for a volume.
        truncated: cut the initial normal distribution at two; the released decoder does not.
    """

    def __init__(self, channels: int, kernels: Sequence[int], norm: Norm, *, dims: int, truncated: bool) -> None:
        super().__init__()
        wide = 2 * channels
        convolution = nn.Conv2d if dims == 2 else SafeConv3d
        self.expand = Pointwise(channels, wide, dims=dims)
        self.expand_norm = make_norm(norm, wide, dims)
        self.scales = nn.ModuleList(
            convolution(wide, wide, kernel, padding=kernel // 2, groups=wide, bias=False) for kernel in kernels
        )
        self.scale_norms = nn.ModuleList(make_norm(norm, wide, dims) for _ in kernels)
        self.reduce = Pointwise(wide, channels, dims=dims)
        self.reduce_norm = make_norm(norm, channels, dims)
        for layer in (self.expand, *self.scales, self.reduce):
            (nn.init.trunc_normal_ if truncated else nn.init.normal_)(layer.weight, std=0.02)

    def forward(self, z: Tensor) -> Tensor:
        """Add multi-scale context to `(B, C, h, w)` or `(B, C, D, H, W)`."""
        wide = F.relu6(self.expand_norm(self.expand(z)))
        branches = (
            F.relu6(norm(_depthwise(scale, wide))) for scale, norm in zip(self.scales, self.scale_norms, strict=True)
        )
        context: Tensor = self.reduce_norm(mix_channels(sum_of(branches), self._shuffled_weight()))
        return z + context

    def _shuffled_weight(self) -> Tensor:
        """The reducing weights for unshuffled channels.

        The released network first puts all even channels before all odd ones. That only permutes the columns of this
        small matrix, so the columns are permuted instead of the features.
        """
        weight = self.reduce.weight
        return weight.reshape(weight.shape[0], 2, -1).transpose(1, 2).reshape(weight.shape)


def _depthwise(convolution: nn.Module, x: Tensor) -> Tensor:
    weight = convolution.get_parameter("weight")
    if weight.shape[-1] == 1:  # one weight per channel: a product, much cheaper than a convolution
        return x * weight.view(1, -1, *[1] * (x.dim() - 2))
    y: Tensor = convolution(x)
    return y


class ResidualConv(nn.Module):
    """Two 3x3x3 convolutions around a shortcut.

    Args:
        in_channels: input width.
        out_channels: output width; the shortcut is a 1x1x1 convolution where the widths differ.
        norm: of the stage blocks, or None for the full resolution: instance norm without parameters.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: Norm | None) -> None:
        super().__init__()
        self.conv1 = Conv3d(in_channels, out_channels)
        self.norm1 = make_norm(norm, out_channels)
        self.conv2 = Conv3d(out_channels, out_channels)
        self.norm2 = make_norm(norm, out_channels)
        projected = in_channels != out_channels
        self.shortcut = Pointwise(in_channels, out_channels) if projected else None
        self.shortcut_norm = make_norm(norm, out_channels) if projected else None

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Convolve twice and add the shortcut."""
        y = self.norm2(self.conv2(F.leaky_relu(self.norm1(self.conv1(x_BCDHW)), 0.01, inplace=True)))
        shortcut = x_BCDHW
        if self.shortcut is not None and self.shortcut_norm is not None:
            shortcut = self.shortcut_norm(self.shortcut(x_BCDHW))
        return F.leaky_relu(y + shortcut, 0.01, inplace=True)


def _recomputation(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_kept(block)


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """While activations are recomputed, running statistics must not move a second time."""
    norms = [child for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    counts = [None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone() for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of at least one tensor."""
    first, *others = tensors
    for other in others:
        first = first + other
    return first


def level_grid(patch_size: Size, coarsest: Size, stride: Size) -> Size:
    """Grid of a level with this `stride` for a patch that is padded to a multiple of the coarsest level's."""
    d, h, w = (-(-n // c) * c // s for n, c, s in zip(patch_size, coarsest, stride, strict=True))
    return d, h, w


def _times(size: Size, factor: int) -> Size:
    return size[0] * factor, size[1] * factor, size[2] * factor


def _size(x_BCDHW: Tensor) -> Size:
    return x_BCDHW.shape[2], x_BCDHW.shape[3], x_BCDHW.shape[4]
