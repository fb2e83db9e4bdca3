"""Soft Dice plus cross-entropy, over one or several outputs of a network.

The recipe of nnU-Net (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z), which MLRU++ follows: both terms with
weight one, Dice over foreground labels only and over the batch as one volume, softmax, smoothing 1e-5 in numerator and
denominator. Deep supervision adds the same loss of coarser outputs, against the label on their own grid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class DiceCrossEntropy(nn.Module):
    """Soft Dice + cross-entropy, averaged over outputs with normalised weights.

    Args:
        weights: one per output, the full-resolution one first; absent: 1, 1/2, 1/4, ... Normalised to sum 1 over the
            outputs that are there, so a network may return fewer.
        batch_dice: take Dice over the whole batch, which copes with patches that lack a structure; else per patch.
    """

    def __init__(self, weights: Sequence[float] | None = None, *, batch_dice: bool = True) -> None:
        super().__init__()
        from monai.losses import DiceLoss  # here, since importing MONAI takes a second or two

        self.weights = None if weights is None else tuple(weights)
        self.dice = DiceLoss(
            include_background=False, to_onehot_y=True, softmax=True, batch=batch_dice, smooth_nr=1e-5, smooth_dr=1e-5
        )

    def forward(self, logits: Tensor | Sequence[Tensor], label_B1DHW: Tensor) -> Tensor:
        """Mean loss of all outputs, computed in fp32 whatever the precision of the logits.

        Args:
            logits: `(B, K, d, h, w)`, or a sequence of them, each on the label's grid or a coarser one.
            label_B1DHW: label values 0..K-1, any integer or floating type.
        """
        outputs = (logits,) if isinstance(logits, Tensor) else tuple(logits)
        total = torch.zeros((), device=label_B1DHW.device)
        for weight, output in zip(output_weights(len(outputs), self.weights), outputs, strict=True):
            total = total + weight * self._one(output.float(), label_on_grid(label_B1DHW, output.shape[2:]))
        return total

    def _one(self, logits_BKDHW: Tensor, label_B1DHW: Tensor) -> Tensor:
        dice: Tensor = self.dice(logits_BKDHW, label_B1DHW)
        return dice + functional.cross_entropy(logits_BKDHW, label_B1DHW[:, 0].long())


def output_weights(count: int, weights: Sequence[float] | None = None) -> tuple[float, ...]:
    """Weights of `count` outputs that sum to 1: the first `count` of `weights`, or 1, 1/2, 1/4, ...

    Raises:
        ValueError: there are fewer weights than outputs, or they do not sum to something positive.
    """
    chosen = [0.5**index for index in range(count)] if weights is None else list(weights[:count])
    if len(chosen) < count or not sum(chosen) > 0:
        raise ValueError(f"{count} outputs need as many deep supervision weights with a positive sum, got {weights}")
    return tuple(weight / sum(chosen) for weight in chosen)


def label_on_grid(label_B1DHW: Tensor, size: Sequence[int]) -> Tensor:
    """The label on another grid of the same field of view: each voxel takes the value at its centre (nearest)."""
    if tuple(label_B1DHW.shape[2:]) == tuple(size):
        return label_B1DHW
    return functional.interpolate(label_B1DHW.float(), size=tuple(size), mode="nearest-exact")
