"""Whether a network's confidence is what it is worth: reliability, ECE and Brier score near the border of the structures.

Over a whole volume, calibration is that of the background. So it is measured in a ring: voxels within 4 voxels of the border of
the reference's foreground, on either side of it.

Expected calibration error: Naeini et al. 2015 (AAAI), of the most likely label; here with 15 bins of equal width, voxels of all
cases together. Brier score (1950): the sum over labels of the squared distance to the truth, from 0 to 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RING = 4.0
"""Half the ring's width in voxels."""
BINS = 15


@dataclass(frozen=True)
class Confidence:
    """Sums over the voxels of a ring, which add up over cases."""

    voxels: tuple[float, ...]
    """By bin of confidence, from 0 to 1."""
    confidence: tuple[float, ...]
    """Sum of confidences."""
    correct: tuple[float, ...]
    """How many voxels were right."""
    brier: float
    """Sum over voxels."""


def confidence_of(logits_KDHW: Tensor, reference_DHW: NDArray[np.uint8]) -> Confidence:
    """What a network's logits say about the ring around a reference that is not empty."""
    box, inside = ring(reference_DHW)
    truth_N = torch.from_numpy(reference_DHW[box][inside].astype(np.int64))
    probabilities_KN = logits_KDHW[(slice(None), *box)][:, torch.from_numpy(inside)].double().softmax(dim=0)
    confidence_N, predicted_N = probabilities_KN.max(dim=0)
    known = truth_N.clamp(max=len(probabilities_KN) - 1)
    brier = (probabilities_KN**2).sum() - 2 * probabilities_KN.gather(0, known[None]).sum() + len(truth_N)
    sure = confidence_N.numpy()
    bins = np.minimum((sure * BINS).astype(np.int64), BINS - 1)
    right = (predicted_N == truth_N).numpy().astype(np.float64)
    voxels, sums, correct = (np.bincount(bins, weights, BINS) for weights in (np.ones_like(sure), sure, right))
    return Confidence(tuple(voxels.tolist()), tuple(sums.tolist()), tuple(correct.tolist()), float(brier))


def ring(reference_DHW: NDArray[np.uint8]) -> tuple[tuple[slice, ...], NDArray[np.bool_]]:
    """A box, and which of its voxels are within `RING` voxels of the foreground's border.

    Distances are between voxel centres, to the nearest voxel on the other side of the border.
    """
    from scipy import ndimage

    margin = int(RING)
    found = ndimage.find_objects((reference_DHW > 0).astype(np.uint8))[0]
    box = tuple(slice(max(0, one.start - margin), one.stop + margin) for one in found)
    inside = reference_DHW[box] > 0
    outward = ndimage.distance_transform_edt(~inside)
    inward = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1, 1:-1]  # beyond the volume there is nothing
    return box, np.asarray((outward + inward) <= RING)


def expected_error(
    voxels_B: NDArray[np.float64], confidence_B: NDArray[np.float64], correct_B: NDArray[np.float64]
) -> NDArray[np.float64]:
    """ECE of sums over voxels; the last axis is that of the bins, NaN where there are no voxels."""
    total = voxels_B.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.abs(correct_B - confidence_B).sum(axis=-1) / total)


def stacked(cases: Sequence[Confidence]) -> NDArray[np.float64]:
    """`(cases, 3, BINS)`: voxels, confidence, correct."""
    return np.array([(case.voxels, case.confidence, case.correct) for case in cases], dtype=np.float64)
