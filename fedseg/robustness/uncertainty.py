"""How far a network disagrees with itself on a case, which needs no reference: a warning that can be given at a hospital.

Test-time augmentation (Wang et al. 2019, doi:10.1016/j.neucom.2019.01.103): the image is flipped left to right, and made
slightly brighter and darker. Deep supervision: the coarser heads of a network that has them against its finest.
A disagreement is 1 minus the mean Dice between the segmentations: 0 where all are the same.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedseg.config import Experiment
from fedseg.data.augment import left_right_axis, mirror_pairs
from fedseg.data.preprocess import PreparedCase
from fedseg.metrics import score_case

GAINS = ((1.1, 0.1), (0.9, -0.1))
"""Scale and offset of prepared intensities, whose standard deviation is 1 (MR), or whose window is -1 to 1 (CT)."""

Predict = Callable[[nn.Module, NDArray[np.float32]], Tensor]


@dataclass(frozen=True)
class Doubt:
    """Disagreements in [0, 1]."""

    augmented: float
    """With the segmentations of the changed image."""
    heads: float | None
    """With the coarser heads; None where the network has none."""


def doubt_of(
    model: nn.Module, label_DHW: NDArray[np.int64], case: PreparedCase, experiment: Experiment, predict: Predict
) -> Doubt:
    """How far a network disagrees with its own segmentation.

    Args:
        model: the network.
        label_DHW: what it makes of the image.
        case: the image.
        experiment: what the network was trained for.
        predict: gives the logits `(K, D, H, W)` of a network and an image.
    """
    structures = experiment.task.structures
    axis = left_right_axis(experiment.data.orientation)
    flipped = predict(model, np.flip(case.image, 1 + axis).copy()).flip(1 + axis).argmax(dim=0).numpy()
    others = [_exchanged(flipped, experiment.task.labels)]
    others += [predict(model, case.image * scale + offset).argmax(dim=0).numpy() for scale, offset in GAINS]

    def disagreement(labels: list[NDArray[np.int64]]) -> float:
        scores = [score_case(label, label_DHW, case.spacing, structures, surface=False) for label in labels]
        dice = [score.dice for by_label in scores for score in by_label.values()]
        return 1 - math.fsum(dice) / len(dice)

    return Doubt(disagreement(others), disagreement(coarse) if (coarse := _coarse(model, case, predict)) else None)


def _exchanged(label_DHW: NDArray[np.int64], labels: dict[str, int]) -> NDArray[np.int64]:
    """What lay on the left lies on the right."""
    table = np.arange(max(*labels.values(), int(label_DHW.max())) + 1)
    for one, other in mirror_pairs(labels):
        table[one] = other
    return np.asarray(table[label_DHW])


def _coarse(model: nn.Module, case: PreparedCase, predict: Predict) -> list[NDArray[np.int64]]:
    """The segmentations of the coarser heads."""
    if not getattr(model, "deep_supervision", False):
        return []
    heads = len(cast("tuple[float, ...]", model.deep_supervision_weights))
    return [part.argmax(dim=0).numpy() for part in predict(_AllHeads(model), case.image).chunk(heads)[1:]]


class _AllHeads(nn.Module):
    """All heads' logits one after the other as channels, on the finest grid, so that windows are blended as usual."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.slice_axis = getattr(model, "slice_axis", None)

    def forward(self, image_BCDHW: Tensor) -> Tensor:
        self.model.training = True  # of the network itself only: its dropout and norms stay as for inference
        try:
            outputs = self.model(image_BCDHW)
        finally:
            self.model.training = False
        size = outputs[0].shape[2:]
        return torch.cat([functional.interpolate(one.float(), size=size, mode="trilinear") for one in outputs], dim=1)
