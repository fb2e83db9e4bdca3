"""Random changes to training patches, fully determined by the generator that is passed in.

Everything is a few numpy or torch calls on arrays: MONAI's dictionary transforms cost more in bookkeeping than the
training step of a small network, and its low resolution moves the image by half a voxel against its label.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional

_RIGHT_OF = {"left": "right", "lh": "rh", "l": "r"}
_LEFT = re.compile(r"left|(?<![^\W_])(lh|l)(?![^\W_])")
"""`left` anywhere, `lh` or `l` as a word of its own."""

Pairs = Sequence[tuple[int, int]]
Augmentation = Callable[
    [NDArray[np.float32], NDArray[np.uint8], np.random.Generator], tuple[NDArray[np.float32], NDArray[np.uint8]]
]
"""`(image_CDHW, label_DHW, generator)` to a changed image and label of the same shapes."""


def build_augmentation(
    kind: Literal["none", "light", "strong"],
    mirrored: Pairs = (),
    flip: int = 2,
    curve: float = 0.0,
) -> Augmentation:
    """Make the augmentation of an experiment.

    Args:
        kind: `none`; `light`: left-right flip, intensity scale and shift; `strong`: also rotation, zoom, noise, blur,
            gamma and low resolution.
        mirrored: label values that change places in a left-right flip; see `mirror_pairs`.
        flip: the axis that runs from left to right: 0, 1, 2 for D, H, W; see `left_right_axis`.
        curve: probability that each channel's intensities go through a random curve afterwards.
    """
    if curve:
        return _curving(build_augmentation(kind, mirrored, flip), curve)
    if kind == "none":
        return lambda image_CDHW, label_DHW, _: (image_CDHW, label_DHW)
    if kind == "light":
        return lambda image_CDHW, label_DHW, generator: _light(image_CDHW, label_DHW, generator, mirrored, flip)
    return lambda image_CDHW, label_DHW, generator: _strong(image_CDHW, label_DHW, generator, mirrored, flip)


def _curving(augment: Augmentation, probability: float) -> Augmentation:
    """Bend intensities along rising Bezier curves at random, as Models Genesis does (Zhou et al., arXiv 1908.06912)."""

    def curving(
        image: NDArray[np.float32], label: NDArray[np.uint8], generator: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        image, label = augment(image, label, generator)
        if generator.random() < probability:
            image = np.stack([_along_bezier(channel, generator.random((2, 2))) for channel in image])
        return image, label

    return curving


def _along_bezier(image: NDArray[np.float32], handles: NDArray[np.float64]) -> NDArray[np.float32]:
    """A cubic Bezier curve over the range of the patch, which never falls; mean and standard deviation stay.

    Args:
        image: one channel.
        handles: the two inner points `(x, y)` of the curve from (0, 0) to (1, 1), in the unit square.
    """
    low, extent, mean, spread = image.min(), np.ptp(image), image.mean(), image.std()
    if extent == 0:
        return image
    t = np.linspace(0, 1, 256)[:, None]
    x, y = (3 * (1 - t) ** 2 * t * handles[0] + 3 * (1 - t) * t**2 * handles[1] + t**3).T
    bent = np.interp((image - low) / extent, x, y)
    return np.asarray((bent - bent.mean()) / bent.std() * spread + mean, dtype=np.float32)


def left_right_axis(orientation: str) -> int:
    """The array axis 0, 1, 2 (D, H, W) that runs from left to right; codes such as `RAS` name them in reverse."""
    return 2 - next(place for place, code in enumerate(orientation) if code in "LR")


def mirror_pairs(labels: dict[str, int]) -> list[tuple[int, int]]:
    """Label values that a left-right flip must exchange.

    Names that differ in left and right only, whatever their case: `left kidney` and `right kidney`, `Hippocampus_L` and
    `Hippocampus_R`, `lh-cortex` and `rh-cortex`.
    """
    values = {name.lower(): value for name, value in labels.items()}
    others = {name: _LEFT.sub(lambda side: _RIGHT_OF[side[0]], name) for name in values}
    return [(values[name], values[other]) for name, other in others.items() if other != name and other in values]


def _light(
    image: NDArray[np.float32], label: NDArray[np.uint8], generator: np.random.Generator, mirrored: Pairs, flip: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    if generator.random() < 0.5:
        image, label = np.flip(image, flip + 1), _exchange(np.flip(label, flip), mirrored)
    channels = (len(image), 1, 1, 1)
    scale = generator.uniform(0.9, 1.1, channels).astype(np.float32)
    shift = generator.uniform(-0.1, 0.1, channels).astype(np.float32)
    return image * scale + shift, label


def _exchange(label: NDArray[np.uint8], mirrored: Pairs) -> NDArray[np.uint8]:
    if not mirrored:
        return label
    table = np.arange(256, dtype=np.uint8)
    for left, right in mirrored:
        table[left], table[right] = right, left
    return table[label]


def _strong(
    image: NDArray[np.float32], label: NDArray[np.uint8], generator: np.random.Generator, mirrored: Pairs, flip: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    if generator.random() < 0.3:
        image, label = _rotate_and_zoom(image, label, generator)
    image, label = _light(image, label, generator, mirrored, flip)
    return _spoil(image, generator), label


def _rotate_and_zoom(
    image: NDArray[np.float32], label: NDArray[np.uint8], generator: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Rotate by up to 15 degrees about each axis and zoom by up to 20 %, in voxels; the edge is continued outside."""
    turn = np.eye(3)
    for axis, angle in enumerate(generator.uniform(-np.pi / 12, np.pi / 12, 3)):
        one, two = (other for other in range(3) if other != axis)
        plane = np.eye(3)
        plane[[one, one, two, two], [one, two, one, two]] = [
            np.cos(angle),
            -np.sin(angle),
            np.sin(angle),
            np.cos(angle),
        ]
        turn = turn @ plane
    turn = turn / generator.uniform(0.8, 1.2)
    size_WHD = np.array(image.shape[:0:-1], dtype=np.float64)
    in_unit_cube = turn * (size_WHD[None, :] / size_WHD[:, None])
    theta = torch.from_numpy(np.concatenate([in_unit_cube, np.zeros((3, 1))], axis=1)[None].astype(np.float32))
    grid = functional.affine_grid(theta, [1, 1, *image.shape[1:]], align_corners=False)
    sample: dict[str, Any] = {"padding_mode": "border", "align_corners": False}
    turned = functional.grid_sample(torch.from_numpy(np.array(image))[None], grid, mode="bilinear", **sample)
    labels = torch.from_numpy(np.array(label, dtype=np.float32))[None, None]
    turned_label = functional.grid_sample(labels, grid, mode="nearest", **sample)
    return turned[0].numpy(), turned_label[0, 0].numpy().astype(np.uint8)


def _spoil(image: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.float32]:
    """nnU-Net's intensity augmentations, about as often: noise, blur, contrast, low resolution."""
    if generator.random() < 0.15:
        image = image + generator.normal(0, generator.uniform(0, 0.1), image.shape).astype(np.float32)
    if generator.random() < 0.2:
        sigma = generator.uniform(0.5, 1.0)
        image = ndimage.gaussian_filter(image, (0, sigma, sigma, sigma), mode="nearest")
    if generator.random() < 0.3:
        image = _bend_contrast(image, generator.uniform(0.7, 1.5))
    if generator.random() < 0.25:
        image = _lower_resolution(image, generator.uniform(0.5, 1.0))
    return image


def _bend_contrast(image: NDArray[np.float32], gamma: float) -> NDArray[np.float32]:
    """A gamma curve over the range of the patch that keeps its mean and standard deviation."""
    low, extent, mean, spread = image.min(), np.ptp(image), image.mean(), image.std()
    if extent == 0:
        return image
    bent = ((image - low) / extent) ** np.float32(gamma)
    return np.asarray((bent - bent.mean()) / bent.std() * spread + mean, dtype=np.float32)


def _lower_resolution(image: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """Average into fewer voxels and interpolate back."""
    size = image.shape[1:]
    tensor = torch.from_numpy(np.ascontiguousarray(image))[None]
    small = functional.interpolate(tensor, [max(1, round(n * share)) for n in size], mode="area")
    return functional.interpolate(small, size, mode="trilinear", align_corners=False)[0].numpy()
