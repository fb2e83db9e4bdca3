"""From a network and a volume to logits and labels: one pass if the volume fits into a patch, else a sliding window.

Windows overlap and are blended with a Gaussian, as in nnU-Net (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedseg.device import Precision, autocast
from fedseg.slicing import EACH_ALONE, Slicing

Forward = Callable[[Tensor], Tensor]

MAX_VOXELS_ON_GPU = 2**24
"""Larger volumes (about 256³) gather their logits in main memory, window by window."""
MAX_PIXELS_ON_GPU, MAX_PIXELS_ON_CPU = 2**22, 2**18
"""A network of images gets so many pixels at a time: 64 slices of 256², or 4."""


@torch.no_grad()
def predict_logits(
    model: nn.Module,
    image_CDHW: NDArray[np.float32] | Tensor,
    patch_size: Sequence[int],
    *,
    overlap: float = 0.5,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    batch_size: int = 1,
    mirror: bool = False,
    slicing: Slicing = EACH_ALONE,
) -> Tensor:
    """Logits of a whole volume.

    A volume shorter than the patch is padded on both sides, so that the network sees the field of view that it was trained
    on; the padding is cut off again. A network of images, which sees each slice alone (`model.slice_axis`), gets windows
    of as many slices as fill the device, without overlap along that axis.

    Args:
        model: on `device` already; run in evaluation mode, its modes are restored afterwards.
        image_CDHW: preprocessed image.
        patch_size: window in voxels `(D, H, W)`.
        overlap: share of a window that it has in common with its neighbour, in [0, 1).
        device: where windows are computed.
        precision: autocast type of the network; blending is in fp32.
        batch_size: windows per forward pass.
        mirror: average over the eight flips of the volume (test-time augmentation, eight times the work).
        slicing: neighbouring slices that become channels; beyond the volume's ends its last slices are repeated.

    Returns:
        `(K, D, H, W)`, float32, on the CPU; an ordinary tensor, to be changed in place as one likes.
    """
    device = torch.device(device)
    if isinstance(image_CDHW, np.ndarray) and not image_CDHW.flags.writeable:
        image_CDHW = np.array(image_CDHW)  # memory maps of the cache are read-only, which tensors cannot be
    image_1CDHW = torch.as_tensor(image_CDHW, dtype=torch.float32)[None]
    flips = _all_flips() if mirror else [()]
    windows = _Windows(tuple(patch_size), overlap, batch_size, getattr(model, "slice_axis", None))
    context = autocast(device, precision)

    def forward(windows_BCDHW: Tensor) -> Tensor:
        with context:
            output = model(windows_BCDHW)
        logits: Tensor = output if isinstance(output, Tensor) else output[0]
        return logits.float()

    with evaluating(model):
        total: Tensor | None = None
        for axes in flips:
            logits = _one_view(forward, image_1CDHW.flip(axes), windows, slicing, device).flip(axes)
            total = logits if total is None else total.add_(logits)
    assert total is not None
    return (total if len(flips) == 1 else total.div_(len(flips)))[0]


def predict_label(
    model: nn.Module,
    image_CDHW: NDArray[np.float32] | Tensor,
    patch_size: Sequence[int],
    **options: Any,
) -> NDArray[np.uint8]:
    """The label with the largest logit at each voxel, `(D, H, W)`; arguments as in `predict_logits`."""
    logits_KDHW = predict_logits(model, image_CDHW, patch_size, **options)
    label: NDArray[np.uint8] = logits_KDHW.argmax(dim=0).to(torch.uint8).numpy()
    return label


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode inside, and afterwards every module's own mode again (a frozen part may differ from the rest)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def _all_flips() -> list[tuple[int, ...]]:
    return [axes for count in range(4) for axes in itertools.combinations((2, 3, 4), count)]


@dataclass(frozen=True)
class _Windows:
    """How a volume is cut into windows."""

    patch_size: tuple[int, ...]
    overlap: float
    batch_size: int
    slice_axis: int | None
    """Axis along which the network's slices have nothing to do with each other."""

    def size(self, volume: Sequence[int], device: torch.device) -> tuple[int, ...]:
        """Window in voxels; as many slices as fill the device, if the network sees each of them alone."""
        if self.slice_axis is None:
            return self.patch_size
        size = list(self.patch_size)
        size[self.slice_axis] = 1
        fitting = MAX_PIXELS_ON_GPU if device.type == "cuda" else MAX_PIXELS_ON_CPU
        size[self.slice_axis] = min(volume[self.slice_axis], max(1, fitting // (math.prod(size) * self.batch_size)))
        return tuple(size)

    def overlaps(self) -> tuple[float, ...]:
        """Overlap along D, H, W."""
        return tuple(0.0 if axis == self.slice_axis else self.overlap for axis in range(3))


def _one_view(
    forward: Forward, image_1CDHW: Tensor, windows: _Windows, slicing: Slicing, device: torch.device
) -> Tensor:
    padded_1CDHW, inside = pad_to_patch(image_1CDHW, windows.patch_size)
    size = tuple(padded_1CDHW.shape[2:])
    window = windows.size(size, device)
    if slicing.count > 1:
        pads = [slicing.margin * (axis == slicing.axis) for axis in (2, 2, 1, 1, 0, 0)]
        padded_1CDHW = slicing.stack(functional.pad(padded_1CDHW, pads, mode="replicate"))
    if size == window:
        return forward(padded_1CDHW.to(device))[inside].cpu()
    from monai.inferers import sliding_window_inference  # here, since importing MONAI takes a second or two

    gather_on = device if math.prod(size) <= MAX_VOXELS_ON_GPU else torch.device("cpu")
    logits: Tensor = sliding_window_inference(
        padded_1CDHW,
        roi_size=window,
        sw_batch_size=windows.batch_size,
        predictor=forward,
        overlap=windows.overlaps(),
        mode="gaussian",
        sw_device=device,
        device=gather_on,
    )
    return logits[inside].cpu()


def pad_to_patch(image_1CDHW: Tensor, patch_size: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """Grow a volume to the patch on both sides, with each channel's smallest value (air) as in training patches.

    Returns:
        The volume, no shorter than the patch on any axis, and where the original lies in it, batch and channels included.
    """
    size = tuple(image_1CDHW.shape[2:])
    grown = tuple(max(length, patch) for length, patch in zip(size, patch_size, strict=True))
    starts = [(wide - length) // 2 for length, wide in zip(size, grown, strict=True)]
    inside = (slice(None), slice(None), *(slice(at, at + length) for at, length in zip(starts, size, strict=True)))
    if grown == size:
        return image_1CDHW, inside
    padded = image_1CDHW.amin(dim=(2, 3, 4), keepdim=True).expand(-1, -1, *grown).clone()
    padded[inside] = image_1CDHW
    return padded, inside
