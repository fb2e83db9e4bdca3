"""Artefacts of MR that arise while k-space is filled: motion, ghosts, spikes, truncation.

The middle of k-space stays with the label: a patient who moves is in place while the middle is read, so that artefacts spoil the
image and do not move it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from fedseg.data.shift.draw import Draw

Field3D = NDArray[np.float32]

GHOST_EVERY = 4
"""Lines from one spoilt line to the next; the ghosts lie a quarter of the field of view apart."""


def motion(image: Field3D, amount: float, draw: Draw) -> Field3D:
    """The patient moves once before and once after the middle of k-space is read, by `amount` voxels and as many degrees."""
    axis = draw.pick_axis()
    frequency = _along(np.abs(_signed(image.shape[axis])), axis)
    before = _along(_signed(image.shape[axis]) < 0, axis)
    spectrum = fft.fftn(image)
    for early in (True, False):
        moved = fft.fftn(_move(image, amount, draw.case))
        onset = draw.case.uniform(0.02, 0.08)
        spectrum = np.where((before == early) & (frequency > onset), moved, spectrum)
    return _magnitude(fft.ifftn(spectrum))


def ghosting(image: Field3D, share: float, draw: Draw) -> Field3D:
    """Every fourth line of k-space has lost `share` times its signal, the middle one excepted; above 1 its sign is turned."""
    axis = draw.pick_axis()
    place = np.rint(_signed(image.shape[axis]) * image.shape[axis]).astype(int)
    lines = np.where((place % GHOST_EVERY == 0) & (place != 0), 1 - share, 1)
    return _magnitude(fft.ifft(fft.fft(image, axis=axis) * _along(lines, axis), axis=axis))


def spike(image: Field3D, height: float, draw: Draw) -> Field3D:
    """One point of k-space is far too high: stripes of one direction and width, the site's, over the whole image."""
    direction = draw.site.normal(size=3)
    direction /= np.linalg.norm(direction)
    cycles = np.rint(direction * draw.site.uniform(0.08, 0.16) * image.shape).astype(int)
    spectrum = fft.rfftn(image)
    if cycles[2] < 0:  # the real transform holds the other half of k-space only
        cycles = -cycles
    total = float(np.abs(spectrum[0, 0, 0]))
    spectrum[tuple(cycles)] += height / 2 * total * np.exp(2j * np.pi * draw.case.random())
    if cycles[2] == 0 and cycles.any():
        spectrum[tuple(-cycles)] = np.conj(spectrum[tuple(cycles)])
    return _magnitude(fft.irfftn(spectrum, image.shape))


def gibbs(image: Field3D, share: float, _: Draw) -> Field3D:
    """K-space ends early: detail is lost and edges ring."""
    d, h, w = (_along(np.square(2 * _signed(n)), axis) for axis, n in enumerate(image.shape))
    return _magnitude(fft.ifftn(fft.fftn(image) * (d + h + w <= (1 - share) ** 2)))


def _signed(size: int) -> NDArray[np.float64]:
    """Frequencies from -0.5 to 0.5 in the order of the transform."""
    return np.asarray(fft.fftfreq(size), dtype=np.float64)


def _along(values: NDArray[Any], axis: int) -> NDArray[Any]:
    return values.reshape([-1 if other == axis else 1 for other in range(3)])


def _move(image: Field3D, amount: float, generator: np.random.Generator) -> Field3D:
    """Turn about a random axis and shift in a random direction."""
    turn_axis, shift = _unit(generator), amount * _unit(generator)
    angle = np.deg2rad(amount)
    x, y, z = turn_axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    middle = (np.array(image.shape) - 1) / 2
    return np.asarray(ndimage.affine_transform(image, turn, middle - turn @ middle + shift, order=1, mode="nearest"))


def _unit(generator: np.random.Generator) -> NDArray[np.float64]:
    vector = generator.normal(size=3)
    return np.asarray(vector / np.linalg.norm(vector))


def _magnitude(image: NDArray[Any]) -> Field3D:
    return np.asarray(np.abs(image), dtype=np.float32)
