"""Random patches for training: an epoch is a function of seed and number, whatever happened before."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedseg.config import TrainingConfig
from fedseg.data.augment import Pairs, build_augmentation, left_right_axis
from fedseg.data.preprocess import PreparedCase
from fedseg.slicing import EACH_ALONE, Slicing

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Batch:
    """Patches for one training step."""

    image: torch.Tensor
    """float32 `(B, C, D, H, W)`; with neighbouring slices as channels, if the network sees them."""
    label: torch.Tensor
    """uint8 `(B, 1, D, H, W)`."""


class PatchSampler:
    """Draws batches of patches from the cases of a site.

    Args:
        cases: labelled cases, all in one orientation; their order does not matter if their names differ.
        config: patch and batch size, steps per epoch, foreground share, augmentation.
        seed: with the number of the epoch, decides everything.
        mirrored: label values that change places in a left-right flip; see `fedseg.data.augment.mirror_pairs`.
        slicing: neighbouring slices that become channels. They come from the volume, not from the patch; beyond the
            volume's ends its last slices are repeated.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        config: TrainingConfig,
        seed: int,
        mirrored: Pairs = (),
        slicing: Slicing = EACH_ALONE,
    ) -> None:
        if not cases:
            raise ValueError("a patch sampler needs at least one case")
        self._cases = sorted(cases, key=lambda case: case.name)
        self._config = config
        self._seed = seed
        self._slicing = slicing
        flip = left_right_axis(self._cases[0].geometry.source.orientation)
        self._augment = build_augmentation(config.augmentation, mirrored, flip, config.contrast_curve)
        self._extremes: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}

    def __len__(self) -> int:
        """Steps in an epoch."""
        return self._config.steps_per_epoch or math.ceil(len(self._cases) / self._config.batch_size)

    def epoch(self, index: int) -> Iterator[Batch]:
        """The batches of one epoch.

        Without `steps_per_epoch` every case gives one patch, in random order; the last batch is filled with cases from
        the start, so that no batch is smaller than the others.

        Args:
            index: number of the epoch, from 0.
        """
        order = self._order(index)
        size = self._config.batch_size
        for step in range(len(self)):
            generator = np.random.default_rng((self._seed, index, step, 1))
            patches = [self._patch(int(i), generator) for i in order[step * size : (step + 1) * size]]
            yield Batch(
                self._slicing.stack(torch.from_numpy(np.stack([image for image, _ in patches]))),
                torch.from_numpy(np.stack([label for _, label in patches])[:, None]),
            )

    def _order(self, index: int) -> NDArray[np.int64]:
        generator = np.random.default_rng((self._seed, index))
        wanted = len(self) * self._config.batch_size
        if self._config.steps_per_epoch is None:
            return np.resize(generator.permutation(len(self._cases)), wanted)
        passes = math.ceil(wanted / len(self._cases))
        return np.concatenate([generator.permutation(len(self._cases)) for _ in range(passes)])[:wanted]

    def _patch(self, number: int, generator: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        case = self._cases[number]
        if case.label is None:
            raise ValueError(f"{case.name} has no label and cannot be trained on")
        start, margin = self._start(case, generator), self._margin()
        label = cut(case.label[None], start - margin, self._size(2 * margin), np.zeros(1, dtype=np.uint8))[0]
        share = self._config.contrast_reversal
        image = self._cut_image(number, start, reverse=share > 0 and generator.random() < share)
        changed_image, changed_label = self._augment(image, label, generator)
        return np.ascontiguousarray(changed_image), np.ascontiguousarray(self._slicing.inner(changed_label))

    def _cut_image(self, number: int, start: NDArray[np.int64], *, reverse: bool) -> NDArray[np.float32]:
        """The patch and its neighbouring slices, as far as the volume, or the patch if it is larger, has them.

        A reversed one is a patch of the negated volume: what lies outside is dark there, too.
        """
        image = self._cases[number].image
        margin, length = self._margin(), np.array(image.shape[1:])
        first = np.maximum(start - margin, np.minimum(start, 0))
        end = start + np.array(self._config.patch_size)
        last = np.minimum(end + margin, np.maximum(end, length))
        darkest, brightest = self._outside(number)
        patch = cut(image, first, tuple(last - first), brightest if reverse else darkest)
        if reverse:
            np.negative(patch, out=patch)
        axis = self._slicing.axis
        return self._slicing.widen(patch, int((first - start + margin)[axis]), int((end + margin - last)[axis]))

    def _margin(self) -> NDArray[np.int64]:
        """Slices to either side, along D, H, W."""
        return np.array([self._slicing.margin if axis == self._slicing.axis else 0 for axis in range(3)])

    def _size(self, more: NDArray[np.int64]) -> tuple[int, int, int]:
        depth, height, width = np.array(self._config.patch_size) + more
        return int(depth), int(height), int(width)

    def _start(self, case: PreparedCase, generator: np.random.Generator) -> NDArray[np.int64]:
        """First voxel of a patch; negative where the volume is smaller than the patch."""
        patch = np.array(self._config.patch_size)
        room = np.array(case.image.shape[1:]) - patch
        lowest, highest = np.minimum(room, 0), np.maximum(room, 0)
        if case.foreground and generator.random() < self._config.foreground_share:
            values = sorted(case.foreground)
            voxels = case.foreground[values[generator.integers(len(values))]]
            jitter = generator.integers(-(patch // 4), patch // 4 + 1)
            centred = voxels[generator.integers(len(voxels))] - patch // 2 + jitter
            return np.asarray(np.clip(centred, lowest, highest), dtype=np.int64)
        return np.asarray(generator.integers(lowest, highest + 1), dtype=np.int64)

    def _outside(self, number: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Each channel's smallest value, air or the window's lower end, and its largest, which is that of the negated volume."""
        if number not in self._extremes:
            image = self._cases[number].image
            self._extremes[number] = image.min(axis=(1, 2, 3)), image.max(axis=(1, 2, 3))
        return self._extremes[number]


def cut(
    array_CDHW: NDArray[T], start: NDArray[np.int64], size: tuple[int, int, int], outside: NDArray[T]
) -> NDArray[T]:
    """Copy a box out of an array; what lies outside of it gets each channel's value in `outside`, `(C,)`."""
    shape = np.array(array_CDHW.shape[1:])
    low, high = np.clip(start, 0, shape), np.clip(start + np.array(size), 0, shape)
    (d0, h0, w0), (d1, h1, w1) = low, high
    if (high - low == np.array(size)).all():
        return np.array(array_CDHW[:, d0:d1, h0:h1, w0:w1])
    patch = np.broadcast_to(outside[:, None, None, None], (len(array_CDHW), *size)).copy()
    (a0, b0, c0), (a1, b1, c1) = low - start, high - start
    patch[:, a0:a1, b0:b1, c0:c1] = array_CDHW[:, d0:d1, h0:h1, w0:w1]
    return patch
