"""Contrast, shading, noise and storage of MR images; bright tissue is about 1, no signal is 0."""

import numpy as np
from numpy.polynomial import legendre
from numpy.typing import NDArray
from scipy import ndimage

from fedseg.data.shift.draw import Draw

Field3D = NDArray[np.float32]

NO_SIGNAL = 0.05
"""Below this share of bright tissue there is air, in every contrast."""


def gamma_bright(image: Field3D, root: float, _: Draw) -> Field3D:
    """Dark tissue becomes brighter."""
    return np.clip(image, 0, None) ** np.float32(1 / root)


def gamma_dark(image: Field3D, power: float, _: Draw) -> Field3D:
    """Dark tissue becomes darker."""
    return np.clip(image, 0, None) ** np.float32(power)


def contrast_curve(image: Field3D, bend: float, draw: Draw) -> Field3D:
    """The site's own curve of intensities, of two waves: flat in places where `bend` is 1, falling there above."""
    phases, waves = draw.site.uniform(0, 2 * np.pi, 2), np.array([1.0, 2.0])
    level = image[..., None] * (2 * np.pi * waves) + phases
    ripple = (np.cos(level) - np.cos(phases)) / (2 * np.pi * waves)
    return np.asarray(image + bend / 2 * ripple.sum(axis=-1), dtype=np.float32)


def contrast_reversal(image: Field3D, share: float, _: Draw) -> Field3D:
    """Reverse the order of the darkest `share` of voxels, as fluid brightens from T1 to T2 weighting.

    The curve falls up to that quantile and rises after it; with 1 it only falls. Air stays without signal. Linear blends with the
    reversed image would be two states only after a z-score: unchanged, or wholly reversed.
    """
    bright = image[image > NO_SIGNAL]
    if not bright.size:
        return image
    turn = np.float32(np.quantile(bright, min(share, 0.995)))
    floor = np.float32(np.quantile(bright, 0.005))
    reversed_ = np.abs(image - turn) + floor
    signal = np.clip(ndimage.gaussian_filter(image, 0.7, mode="nearest") / NO_SIGNAL - 0.5, 0, 1)
    return np.asarray(signal * reversed_ + (1 - signal) * np.minimum(image, NO_SIGNAL), dtype=np.float32)


def bias_field(image: Field3D, strength: float, draw: Draw) -> Field3D:
    """Multiply by the exponential of a cubic polynomial with the given standard deviation: mostly the site's."""
    shape = (4, 4, 4)
    coefficients = draw.site.normal(size=shape) + 0.2 * draw.case.normal(size=shape)
    orders = np.indices(shape).sum(axis=0)
    coefficients[(orders == 0) | (orders > 3)] = 0
    d, h, w = (np.linspace(-1, 1, n) for n in image.shape)
    field = legendre.leggrid3d(d, h, w, coefficients)
    field = (field - field.mean()) / field.std()
    return np.asarray(image * np.exp(strength * field), dtype=np.float32)


def noise(image: Field3D, deviation: float, draw: Draw) -> Field3D:
    """Rician: the magnitude of a complex signal with Gaussian noise in both parts."""
    real, imaginary = draw.case.standard_normal((2, *image.shape), dtype=np.float32) * np.float32(deviation)
    return np.asarray(np.hypot(np.clip(image, 0, None) + real, imaginary), dtype=np.float32)


def gain(image: Field3D, largest: float, draw: Draw) -> Field3D:
    """Other units: a factor and an offset, which a z-score takes out again."""
    factor, offset = draw.case.uniform(0.5, 1, 2)
    return np.asarray(image * (1 + largest * factor) + largest * offset, dtype=np.float32)


def clipping(image: Field3D, share: float, _: Draw) -> Field3D:
    """The brightest and the darkest voxels become alike."""
    return np.clip(image, *np.quantile(image, [share, 1 - share]).astype(np.float32))


def grey_levels(image: Field3D, levels: float, _: Draw) -> Field3D:
    """So many values between the smallest and the largest."""
    low, steps = image.min(), max(1, round(levels) - 1)
    width = max(float(np.ptp(image)) / steps, 1e-12)
    return np.asarray(np.rint((image - low) / width) * width + low, dtype=np.float32)
