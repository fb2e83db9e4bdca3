"""The mixing layers of RWKV on images and volumes: shift, spatial mix, channel mix.

Sources: Duan et al., "Vision-RWKV", arXiv 2403.02308; Jiang et al., "RWKV-UNet", arXiv 2501.08458. All of them work on
channels-last views `(B, H, W, C)` or `(B, D, H, W, C)`; the tokens of a sample are its pixels or voxels in raster order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedseg.layers.kernels import bi_wkv


def shift(x: Tensor) -> Tensor:
    """Replace channels by those of a neighbour: the first group by the left one's, then right, above, below, front, back.

    Each direction has `C // 4` channels in images and `C // 6` in volumes; what is left over stays. Beyond the border
    there is zero.

    Args:
        x: `(B, H, W, C)` or `(B, D, H, W, C)`.
    """
    axes = x.dim() - 2
    group = x.shape[-1] // (2 * axes)
    parts = []
    for direction in range(2 * axes):
        ahead = 1 - 2 * (direction % 2)  # 1: content moves to higher indices
        padding = [0, 0] * (axes + 1)
        at = 2 * (1 + direction // 2)  # channels come first here, then columns, rows, slices
        padding[at], padding[at + 1] = ahead, -ahead
        parts.append(F.pad(x[..., direction * group : (direction + 1) * group], padding))
    return torch.cat([*parts, x[..., 2 * axes * group :]], dim=-1)


class SpatialMix(nn.Module):
    """Attention of linear cost: every token sees every other one, nearer ones more, through Bi-WKV.

    Args:
        channels: width C.
        order: how the tokens of a volume are put in a row, as an order of its axes: `(0, 1, 2)` walks along W first,
            `(1, 2, 0)` along D. Images have `(0, 1)`.
    """

    def __init__(self, channels: int, order: Sequence[int] = (0, 1)) -> None:
        super().__init__()
        self.order = tuple(order)
        self.decay = nn.Parameter(torch.zeros(channels))
        self.first = nn.Parameter(torch.zeros(channels))
        self.mix_key, self.mix_value, self.mix_receptance = (nn.Parameter(torch.full((channels,), 0.5)) for _ in "kvr")
        self.key, self.value, self.receptance, self.output = (_linear(channels) for _ in "kvro")
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of `(B, ..., C)`."""
        shifted = shift(x)
        key, value, receptance = (
            layer(torch.lerp(shifted, x, mix.to(x.dtype)))
            for layer, mix in zip(
                (self.key, self.value, self.receptance),
                (self.mix_key, self.mix_value, self.mix_receptance),
                strict=True,
            )
        )
        mixed = self._from_tokens(bi_wkv(self._tokens(key), self._tokens(value), self.decay, self.first), x.shape)
        gated: Tensor = self.output(torch.sigmoid(receptance) * self.norm(mixed))
        return gated

    def _tokens(self, x: Tensor) -> Tensor:
        """`(B, ..., C)` as `(B, T, C)` in this layer's order."""
        return self._turned(x).flatten(1, -2)

    def _from_tokens(self, x_BTC: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `_tokens`."""
        x = x_BTC.reshape(shape[0], *(shape[1 + axis] for axis in self.order), shape[-1])
        return x.permute(0, *(1 + self.order.index(axis) for axis in range(len(self.order))), x.dim() - 1)

    def _turned(self, x: Tensor) -> Tensor:
        return x.permute(0, *(1 + axis for axis in self.order), x.dim() - 1)


class ChannelMix(nn.Module):
    """A gated two-layer perceptron per token, with the shift in front.

    Args:
        channels: width C; the hidden layer has 2C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix_key, self.mix_receptance = (nn.Parameter(torch.full((channels,), 0.5)) for _ in "kr")
        self.key = nn.Linear(channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(2 * channels)
        self.receptance = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(2 * channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels of `(B, ..., C)`."""
        shifted = shift(x)
        key = self.key(torch.lerp(shifted, x, self.mix_key.to(x.dtype)))
        receptance = self.receptance(torch.lerp(shifted, x, self.mix_receptance.to(x.dtype)))
        hidden = self.norm(F.relu(key).square())
        gated: Tensor = torch.sigmoid(receptance) * self.value(hidden)
        return gated


def _linear(channels: int) -> nn.Linear:
    """A square layer without bias, initialised as in the released network's encoder."""
    layer = nn.Linear(channels, channels, bias=False)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    return layer


def raster_orders(axes: int) -> list[tuple[int, ...]]:
    """The cyclic orders of a grid's axes; each walks along another axis first."""
    return [tuple((start + step) % axes for step in range(axes)) for start in range(axes)]
