"""Artefacts of CT, in Hounsfield units: dose, metal, calibration, stored windows."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedseg.data.shift.draw import Draw

Field3D = NDArray[np.float32]

SOFT_TISSUE = 40.0
"""Middle of a soft-tissue window in HU."""
METAL_HU = 3000.0
ANGLES = 180


def dose(image: Field3D, deviation: float, draw: Draw) -> Field3D:
    """Noise with the grain of filtered back-projection: correlated in the slice, little of it at low frequencies."""
    white = draw.case.standard_normal(image.shape, dtype=np.float32)
    grain = ndimage.gaussian_filter(white, (0, 0.6, 0.6)) - 0.7 * ndimage.gaussian_filter(white, (0, 2, 2))
    return np.asarray(image + np.float32(deviation / max(float(grain.std()), 1e-12)) * grain, dtype=np.float32)


def metal(image: Field3D, height: float, draw: Draw) -> Field3D:
    """An insert of metal with streaks that cross at it: the back-projection of what is wrong in its shadow.

    The insert is a rod along D, a tenth of the slice from the middle at least; streaks are in the slices that it crosses.
    """
    depth, rows, columns = image.shape
    reach = min(rows, columns)
    radius, width = max(1.0, 0.03 * reach), max(0.6, 0.01 * reach)
    away, around = draw.case.uniform(0.1, 0.3) * reach, draw.case.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:rows, :columns].astype(np.float32)
    y -= (rows - 1) / 2 + away * np.sin(around)
    x -= (columns - 1) / 2 + away * np.cos(around)
    streaks = np.zeros((rows, columns), dtype=np.float32)
    for angle, error in zip(np.arange(ANGLES) * np.pi / ANGLES, draw.case.normal(size=ANGLES), strict=True):
        offset = np.square((x * np.cos(angle) + y * np.sin(angle)) / width)
        streaks += np.float32(error) * (1 - offset) * np.exp(-offset / 2)  # what a ramp filter makes of a narrow shadow
    far = np.hypot(x, y)
    streaks *= height / max(float(streaks[far > 2 * radius].std()), 1e-12)
    middle, half = draw.case.uniform(0.35, 0.65) * depth, 0.25 * depth
    along = np.clip((half - np.abs(np.arange(depth) - middle)) / 2 + 1, 0, 1).astype(np.float32)[:, None, None]
    spoilt = image + along * np.clip(streaks, -4 * height, 4 * height)
    return np.asarray(np.where((far <= radius) & (along > 0.5), METAL_HU, spoilt), dtype=np.float32)


def hu_offset(image: Field3D, units: float, _: Draw) -> Field3D:
    """All values are off by so much."""
    return image + np.float32(units)


def window(image: Field3D, width: float, _: Draw) -> Field3D:
    """Values outside a window of soft tissue are lost."""
    return np.clip(image, np.float32(SOFT_TISSUE - width / 2), np.float32(SOFT_TISSUE + width / 2))
