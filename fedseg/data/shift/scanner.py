"""See an image through another scanner: its effects in the order of physics, on intensities before any normalisation."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedseg.data.shift import contrast, ct, kspace, resolution
from fedseg.data.shift.catalogue import EFFECTS, STAGES
from fedseg.data.shift.draw import Draw, draw_for
from fedseg.data.shift.profiles import Effect, ScannerProfile

Field3D = NDArray[np.float32]

BRIGHT = 0.995
"""Quantile of an MR image that counts as bright tissue."""

_PHYSICS: dict[str, Callable[[Field3D, float, Draw], Field3D]] = {
    "thick-slices": resolution.thick_slices,
    "low-resolution": resolution.low_resolution,
    "blur": resolution.blur,
    "sharp-kernel": resolution.sharp_kernel,
    "gamma-bright": contrast.gamma_bright,
    "gamma-dark": contrast.gamma_dark,
    "contrast-curve": contrast.contrast_curve,
    "contrast-reversal": contrast.contrast_reversal,
    "bias-field": contrast.bias_field,
    "motion": kspace.motion,
    "ghosting": kspace.ghosting,
    "spike": kspace.spike,
    "gibbs": kspace.gibbs,
    "metal": ct.metal,
    "noise": contrast.noise,
    "dose": ct.dose,
    "gain": contrast.gain,
    "clipping": contrast.clipping,
    "grey-levels": contrast.grey_levels,
    "hu-offset": ct.hu_offset,
    "window": ct.window,
}


def see_through(image_CDHW: NDArray[np.float32], profile: ScannerProfile, seed: int, case: str) -> NDArray[np.float32]:
    """What a case would look like on another scanner; its geometry stays, see `place` for that.

    MR intensities are scaled to bright tissue, changed, and scaled back to the units of the image. A masked surrounding (zero,
    and more than single voxels) stays zero.

    Args:
        image_CDHW: intensities as read from the file; CT in Hounsfield units.
        profile: the scanner.
        seed: of the site: its axes, directions and places.
        case: name of the case; the same arguments give the same image, in every process.
    """
    return np.stack([_channel(channel, number, profile, seed, case) for number, channel in enumerate(image_CDHW)])


def happening(
    profile: ScannerProfile, seed: int, case: str, *, geometric: bool, channel: int = 0
) -> list[tuple[Effect, float, Draw]]:
    """The effects that this case has, in order, each with its strength for this case and its random numbers."""
    chosen = [e for e in profile.effects if (EFFECTS[e.name].stage == "geometry") == geometric]
    found = []
    for effect in sorted(chosen, key=lambda e: STAGES.index(EFFECTS[e.name].stage)):
        draw = draw_for(seed, effect.name, case, effect.axis, channel)
        chance, wobble = draw_for(seed, f"{effect.name} happens", case).case.random(2)
        if chance < effect.probability:
            low, high = EFFECTS[effect.name].limits
            found.append(
                (effect, float(np.clip(effect.amount * (1 + profile.jitter * (2 * wobble - 1)), low, high)), draw)
            )
    return found


def _channel(image: Field3D, number: int, profile: ScannerProfile, seed: int, case: str) -> Field3D:
    effects = happening(profile, seed, case, geometric=False, channel=number)
    if not effects:
        return image
    low, scale = _range(image) if profile.modality == "mr" else (0.0, 1.0)
    empty = _masked(image) if profile.modality == "mr" else None
    seen = (np.asarray(image, dtype=np.float32) - np.float32(low)) / np.float32(scale)
    for effect, strength, draw in effects:
        seen = _PHYSICS[effect.name](seen, strength, draw)
    seen = seen * np.float32(scale) + np.float32(low)
    if empty is not None:
        seen[empty] = 0
    return np.asarray(seen, dtype=np.float32)


def _range(image: Field3D) -> tuple[float, float]:
    """No signal and bright tissue. Magnitude images start at zero; others, already standardised, at their lowest values."""
    low = 0.0 if image.min() >= 0 else float(np.quantile(image, 1 - BRIGHT))
    return low, max(float(np.quantile(image, BRIGHT)) - low, 1e-30)


def _masked(image: Field3D) -> NDArray[np.bool_]:
    """Where zeros are more than single dark voxels."""
    zero = image == 0
    thick = ndimage.binary_opening(zero, np.ones((3, 3, 3), dtype=np.bool_))
    return np.asarray(ndimage.binary_propagation(thick, mask=zero)) if thick.any() else thick
