"""The yardsticks: MONAI's U-Net and its DynUNet, the network of nnU-Net.

Sources: Cicek et al., "3D U-Net", arXiv 1606.06650; Isensee et al., "nnU-Net", Nature Methods 18 (2021).
"""

from collections.abc import Sequence
from typing import Literal

from monai.networks import nets
from torch import Tensor, nn

from fedseg.layers.conv import make_safe
from fedseg.layers.padding import Margin, Size, crop, margin_for, pad

Norm = Literal["instance", "batch"]


class UNet(nn.Module):
    """MONAI's U-Net, padded and cropped to take any size.

    Args:
        in_channels: channels of the input.
        num_labels: output channels, background included.
        patch_size: not needed, any size will do.
        widths: channels per level, finest first; each level halves the grid.
        residual_units: residual units per level; 0 has plain convolutions.
        norm: normalisation layers.
        dropout: probability, in every convolution.
        deep_supervision: not needed, there is one output.
    """

    deep_supervision = False
    deep_supervision_weights = (1.0,)

    def __init__(
        self,
        in_channels: int,
        num_labels: int,
        patch_size: Size,  # noqa: ARG002
        *,
        widths: Sequence[int] = (16, 32, 64, 128),
        residual_units: int = 0,
        norm: Norm = "instance",
        dropout: float = 0.0,
        deep_supervision: bool = False,  # noqa: ARG002
    ) -> None:
        super().__init__()
        steps = len(widths) - 1
        self.net = nets.UNet(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=num_labels,
            channels=tuple(widths),
            strides=(2,) * steps,
            num_res_units=residual_units,
            norm=norm,
            dropout=dropout,
        )
        make_safe(self.net)
        self.stride: Size = (2**steps, 2**steps, 2**steps)

    def forward(self, image_BCDHW: Tensor) -> Tensor:
        """Segment a batch: logits `(B, K, D, H, W)`."""
        margin = _margin_for(_size(image_BCDHW), self.stride)
        return crop(self.net(pad(image_BCDHW, margin)), margin)


class DynamicUNet(nn.Module):
    """MONAI's DynUNet, padded and cropped to take any size, with its parts registered once.

    MONAI registers every part a second time inside nested skip layers; in a federation each would travel twice.

    Args:
        in_channels: channels of the input.
        num_labels: output channels, background included.
        patch_size: not needed, any size will do.
        widths: channels per level, finest first; each level halves the grid.
        residual: residual blocks instead of plain ones.
        norm: normalisation layers.
        deep_supervision: build auxiliary heads on the coarser decoder levels, at most two.
    """

    def __init__(
        self,
        in_channels: int,
        num_labels: int,
        patch_size: Size,  # noqa: ARG002
        *,
        widths: Sequence[int] = (16, 32, 64, 128),
        residual: bool = False,
        norm: Norm = "instance",
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        steps = len(widths) - 1
        net = nets.DynUNet(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=num_labels,
            kernel_size=[3] * len(widths),
            strides=[1] + [2] * steps,
            upsample_kernel_size=[2] * steps,
            filters=list(widths),
            norm_name=(norm, {"affine": True}),
            res_block=residual,
            deep_supervision=deep_supervision,
            deep_supr_num=min(2, steps - 1),
        )
        self.input_block = net.input_block
        self.downsamples = net.downsamples
        self.bottleneck = net.bottleneck
        self.upsamples = net.upsamples
        self.heads = nn.ModuleList([net.output_block, *(net.deep_supervision_heads if deep_supervision else [])])
        make_safe(self)
        self.deep_supervision = deep_supervision
        self.stride: Size = (2**steps, 2**steps, 2**steps)

    @property
    def deep_supervision_weights(self) -> tuple[float, ...]:
        """Weight of each output's loss, finest first: halved from head to head, summing to one."""
        weights = [0.5**head for head in range(len(self.heads) if self.deep_supervision else 1)]
        return tuple(weight / sum(weights) for weight in weights)

    def forward(self, image_BCDHW: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Segment a batch: logits `(B, K, D, H, W)`, while training with `deep_supervision` a tuple, finest first."""
        margin = _margin_for(_size(image_BCDHW), self.stride)
        features = self._decode(pad(image_BCDHW, margin))
        if not (self.training and self.deep_supervision):
            return crop(self.heads[0](features[0]), margin)
        return tuple(
            crop(head(feature), margin, (2**level, 2**level, 2**level))
            for level, (head, feature) in enumerate(zip(self.heads, features, strict=False))
        )

    def _decode(self, image_BCDHW: Tensor) -> list[Tensor]:
        """The decoder's features, finest first."""
        skips = [self.input_block(image_BCDHW)]
        for downsample in self.downsamples:
            skips.append(downsample(skips[-1]))
        x = self.bottleneck(skips[-1])
        features: list[Tensor] = []
        for upsample, skip in zip(self.upsamples, reversed(skips), strict=True):
            x = upsample(x, skip)
            features.insert(0, x)
        return features


def _margin_for(size: Size, stride: Size) -> Margin:
    """Pad to the stride, but keep two voxels on the coarsest level: MONAI's norms refuse a single one."""
    depth, height, width = stride
    single = all(length <= step for length, step in zip(size, stride, strict=True))
    return margin_for(size, (depth, height, 2 * width) if single else stride)


def _size(x_BCDHW: Tensor) -> Size:
    return x_BCDHW.shape[2], x_BCDHW.shape[3], x_BCDHW.shape[4]
