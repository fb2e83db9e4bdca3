"""The anatomy of a phantom: a made-up abdomen as the share of each tissue in each voxel.

Organs are implicit functions, positive inside, that are blended over a voxel at their borders: that gives partial
volume, and the label is the larger part. Positions are relative: `d` runs from foot to head, `h` from back to front,
`w` from the patient's left to right, each from -1 to 1 across the field of view.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Field3D = NDArray[np.float32]
Shape3D = tuple[int, int, int]
Point = tuple[float, float, float]
About = Callable[[float, float], float]
"""`about(value, spread)`: a value that differs from person to person."""

TISSUES = (
    "air", "fat", "muscle", "visceral fat", "liver", "spleen", "kidneys", "medulla", "spine", "cord", "aorta", "vein",
    "stomach", "bowel", "gallbladder", "lung", "rib", "colon", "gas", "pancreas",
)  # fmt: skip


@dataclass
class Anatomy:
    """One person, painted from back to front."""

    shape: Shape3D
    share: dict[str, Field3D] = field(default_factory=dict)
    """The part of each voxel that each tissue takes; adds up to 1."""

    def __post_init__(self) -> None:
        self._owner: NDArray[np.int16] = np.zeros(self.shape, dtype=np.int16)
        self.share["air"] = np.ones(self.shape, dtype=np.float32)

    def where(self, tissue: str) -> NDArray[np.bool_]:
        """The voxels that belong to a tissue, vessels and medulla to their organ."""
        return np.asarray(self._owner == TISSUES.index(tissue))

    def paint(self, tissue: str, inside: Field3D, limit: Field3D | None = None) -> None:
        """Put a tissue over what is there.

        Args:
            tissue: one of `TISSUES`.
            inside: implicit function, positive inside.
            limit: another implicit function, outside of which nothing is painted.
        """
        cover = self._cover(inside if limit is None else np.minimum(inside, limit))
        box = _box(cover > 0)
        painted, rest = cover[box], 1 - cover[box]
        for other in self.share.values():
            other[box] *= rest
        self._of(tissue)[box] += painted
        self._owner[box][painted > 0.5] = TISSUES.index(tissue)

    def stain(self, organ: str, tissue: str, inside: Field3D) -> None:
        """Turn a part of an organ into another tissue; the voxels remain the organ's."""
        moved = self.share[organ] * self._cover(inside)
        self.share[organ] -= moved
        self._of(tissue)[...] += moved

    def _of(self, tissue: str) -> Field3D:
        return self.share.setdefault(tissue, np.zeros(self.shape, dtype=np.float32))

    def _cover(self, inside: Field3D) -> Field3D:
        return np.asarray(np.clip(inside * (min(self.shape) / 2) + 0.5, 0, 1), dtype=np.float32)


def draw_anatomy(shape: Shape3D, generator: np.random.Generator, variability: float) -> Anatomy:
    """Draw one person.

    Args:
        shape: voxels `(D, H, W)`.
        generator: decides shape and pose.
        variability: scale of the differences between persons; 0 gives one anatomy.
    """

    def about(value: float, spread: float) -> float:
        return value + variability * float(np.clip(generator.normal(), -2, 2)) * spread

    d, h, w = _positions(shape, generator, variability)
    anatomy = Anatomy(shape)
    trunk = _ellipse(h / about(0.70, 0.035), w / about(0.88, 0.035)) * 0.7
    fat = max(about(0.085, 0.03), 0.03)
    cavity = np.minimum(trunk - fat - max(about(0.09, 0.012), 0.06), h + 0.40 + 0.22 * np.abs(w))
    anatomy.paint("fat", trunk)
    anatomy.paint("muscle", trunk - fat)
    anatomy.paint("visceral fat", cavity)
    _paint_ribs(anatomy, trunk - fat - 0.05, d, h, w, about)
    _paint_gut(anatomy, cavity, d, h, w, generator, about)
    _paint_spine(anatomy, trunk - fat, d, h, w, about)
    left, right = (_paint_kidney(anatomy, side, d, h, w, about) for side in (-1.0, 1.0))
    # A kidney dents its neighbour, not the other way round.
    _paint_spleen(anatomy, np.minimum(cavity, -left), d, h, w, about)
    _paint_liver(anatomy, np.minimum(cavity, -right), d, h, w, about)
    dome = about(0.66, 0.04) + 0.26 * np.cos(np.minimum(np.abs(np.abs(w) - 0.4) * 2.2, 1.5)) + 0.12 * h
    anatomy.paint("lung", np.minimum(np.minimum(d - dome, cavity - 0.01), np.abs(w) - 0.16))
    return anatomy


def smooth_noise(shape: Shape3D, knots: int, generator: np.random.Generator) -> Field3D:
    """A random field of standard deviation 1 that varies over 1/`knots` of the volume."""
    fine = generator.normal(size=(knots, knots, knots))
    for size in shape:
        # One axis after the other: the same splines as on the whole grid, twenty times as fast.
        fine = np.tensordot(fine, _splines(size, knots), axes=(0, 0))
    return np.asarray(fine / max(float(fine.std()), 1e-6), dtype=np.float32)


def _positions(shape: Shape3D, generator: np.random.Generator, vary: float) -> tuple[Field3D, Field3D, Field3D]:
    """Positions `(d, h, w)` after a random pose, size and smooth displacement."""
    axes = [np.linspace(-1, 1, n, dtype=np.float32) * (1 - 1 / n) for n in shape]
    mesh = np.stack(np.meshgrid(*axes, indexing="ij"))
    turn = np.eye(3) + vary * generator.normal(0, 0.035, (3, 3))
    move = vary * generator.normal(0, [0.06, 0.02, 0.02])
    posed = np.einsum("ij,jdhw->idhw", turn, mesh) + move[:, None, None, None]
    # Organs are pushed about more than the skin, which would look dented.
    calm = np.clip(1.8 * (1 - np.hypot(mesh[1] / 0.75, mesh[2] / 0.92)), 0.3, 1)
    for axis in range(3):
        posed[axis] += vary * calm * 0.034 * smooth_noise(shape, 4, generator)
        posed[axis] += vary * calm * 0.014 * smooth_noise(shape, 8, generator)
    d, h, w = posed.astype(np.float32)
    return d, h, w


def _paint_ribs(anatomy: Anatomy, wall: Field3D, d: Field3D, h: Field3D, w: Field3D, about: About) -> None:
    """Thin oblique arcs in the body wall of the upper half."""
    arcs = np.cos(2 * np.pi * (d - 0.8 * h) / 0.42 + about(0.0, 0.5)) - 0.55
    rib = np.minimum(np.minimum(0.03 - np.abs(wall), 0.06 * arcs), d + 0.1)
    anatomy.paint("rib", np.minimum(rib, np.abs(w) - 0.25))


def _paint_gut(
    anatomy: Anatomy, cavity: Field3D, d: Field3D, h: Field3D, w: Field3D, generator: np.random.Generator, about: About
) -> None:
    """Loops of small bowel at random places, the colon as a frame around them, pancreas, stomach, and gas on top."""
    for _ in range(14):
        centre = (generator.uniform(-1.1, -0.05), generator.uniform(-0.1, 0.5), generator.uniform(-0.5, 0.5))
        size = (generator.uniform(0.1, 0.19), generator.uniform(0.09, 0.16), generator.uniform(0.12, 0.26))
        anatomy.paint("bowel", _blob(d, h, w, centre, size, tilt=generator.uniform(-0.6, 0.6)), cavity)
    haustra = 0.02 * np.cos(2 * np.pi * d / 0.24 + about(0.0, 1.0))
    for side in (-1.0, 1.0):
        tube = about(0.115, 0.015) + haustra - np.hypot(h - about(0.02, 0.05), w - side * about(0.63, 0.03))
        anatomy.paint("colon", np.minimum(tube, about(0.0, 0.05) - d), cavity)
    sag = about(-0.12, 0.06) + 0.25 * w**2 - 0.15 * (w < 0) * w
    across = np.hypot(d - sag, h - about(0.42, 0.03) + 0.5 * w**2)
    haustra = 0.02 * np.cos(2 * np.pi * w / 0.24 + about(0.0, 1.0))
    transverse = np.minimum(about(0.115, 0.012) + haustra - across, 0.62 - np.abs(w))
    anatomy.paint("colon", transverse, cavity)
    anatomy.paint("gas", np.minimum(transverse - 0.03, h - about(0.43, 0.03)), cavity)
    course = np.hypot(d - about(0.16, 0.04) + 0.35 * w, h - about(0.06, 0.03) + 0.45 * (w + 0.1) ** 2)
    anatomy.paint("pancreas", np.minimum(0.075 - 0.04 * np.abs(w + 0.1) - 0.7 * course + 0.02, 0.4 - np.abs(w + 0.08)))
    centre = (about(0.42, 0.08), about(0.22, 0.05), about(-0.28, 0.05))
    stomach = _blob(d, h, w, centre, (0.42, 0.24, 0.25), tilt=0.4)
    anatomy.paint("stomach", stomach, cavity)
    anatomy.paint("gas", np.minimum(stomach - 0.04, h - centre[1] - about(0.06, 0.04)), cavity)


def _paint_spine(anatomy: Anatomy, inner: Field3D, d: Field3D, h: Field3D, w: Field3D, about: About) -> None:
    """Vertebrae and discs, the canal behind, psoas and back muscles beside, aorta and cava in front."""
    at_h, at_w = about(-0.36, 0.02), about(0.0, 0.02)
    for side in (-1.0, 1.0):
        anatomy.paint("muscle", _blob(d, h, w, (-0.75, at_h + 0.02, at_w + side * 0.2), (0.75, 0.13, 0.11)))
        erector = np.hypot((h - at_h + 0.2) / 0.95, w - at_w - side * 0.19)
        anatomy.paint("muscle", 0.14 - erector, inner)
    body = 0.155 - np.hypot((h - at_h) * 1.1, w - at_w)
    disc = np.cos(2 * np.pi * d / 0.44 + about(0.0, 1.0)) - 0.86
    process = np.minimum(0.045 - np.abs(w - at_w), np.minimum(at_h - 0.05 - h, h - at_h + 0.3))
    anatomy.paint("spine", np.maximum(body, process))
    anatomy.stain("spine", "cord", np.minimum(disc * 0.3, body))
    anatomy.paint("cord", 0.055 - np.hypot(h - at_h + 0.17, w - at_w))
    bend = 0.03 * np.sin(2.5 * d + about(0.0, 1.0))
    radius = max(about(0.078, 0.008), 0.06)
    anatomy.paint("aorta", radius - np.hypot(h - at_h - 0.22, w - at_w + 0.08 - bend))
    anatomy.paint("vein", 0.075 - np.hypot((h - at_h - 0.21) * 1.3, w - at_w - 0.13 - bend))


def _paint_kidney(anatomy: Anatomy, side: float, d: Field3D, h: Field3D, w: Field3D, about: About) -> Field3D:
    """A bean with its hilum towards the middle and a darker medulla; the right one (`side` = 1) lies lower."""
    centre = (about(-0.28 - 0.1 * (side > 0), 0.08), about(-0.25, 0.03), side * about(0.40, 0.03))
    size = (about(0.37, 0.03), about(0.165, 0.013), about(0.18, 0.013))
    hilum = _blob(d, h, w, (centre[0], centre[1] + 0.05, centre[2] - side * 0.18), (0.16, 0.11, 0.10))
    kidney = np.minimum(_blob(d, h, w, centre, size, tilt=-0.18 * side), -hilum)
    anatomy.paint("kidneys", kidney)
    anatomy.stain("kidneys", "medulla", np.minimum(kidney - 0.065, 0.005))
    return kidney


def _paint_spleen(anatomy: Anatomy, cavity: Field3D, d: Field3D, h: Field3D, w: Field3D, about: About) -> None:
    """A bean against the left body wall and kidney, hollowed where the stomach lies."""
    centre = (about(0.36, 0.07), about(-0.12, 0.04), about(-0.55, 0.02))
    size = (about(0.34, 0.04), about(0.30, 0.03), about(0.20, 0.018))
    hollow = _blob(d, h, w, (centre[0], centre[1] + 0.14, centre[2] + 0.24), (0.28, 0.2, 0.14))
    anatomy.paint("spleen", np.minimum(_blob(d, h, w, centre, size, tilt=0.15), -hollow), cavity - 0.02)


def _paint_liver(anatomy: Anatomy, cavity: Field3D, d: Field3D, h: Field3D, w: Field3D, about: About) -> None:
    """A large right lobe under the dome, a left lobe that thins out across the midline, a vein inside, gallbladder."""
    centre = (about(0.28, 0.05), about(0.02, 0.03), about(0.44, 0.03))
    right = _blob(d, h, w, centre, (about(0.66, 0.05), 0.50, 0.38), tilt=about(-0.2, 0.08))
    left = _blob(d, h, w, (about(0.45, 0.05), about(0.26, 0.03), about(0.02, 0.04)), (0.3, 0.2, about(0.44, 0.05)))
    under = 0.6 * (0.75 * w + 0.9 * h + 0.9 * d + about(0.44, 0.06))
    liver = np.minimum(_union(right, left, 0.12), under)
    anatomy.paint("liver", liver, cavity - 0.02)
    for slope in (0.25, 0.7):
        vein = 0.04 - np.hypot(h - 0.06 - slope * (d - 0.3), w - 0.33 - 0.4 * (d - 0.35))
        anatomy.stain("liver", "vein", np.minimum(vein, liver - 0.08))
    at = (about(-0.05, 0.05), about(0.32, 0.03), about(0.28, 0.04))
    anatomy.paint("gallbladder", _blob(d, h, w, at, (0.17, 0.09, 0.09)), cavity)


def _box(inside: NDArray[np.bool_]) -> tuple[slice, ...]:
    """The smallest box around what is true; empty if nothing is."""
    box = []
    for axis in range(3):
        along = np.flatnonzero(inside.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append(slice(int(along[0]), int(along[-1]) + 1) if len(along) else slice(0, 0))
    return tuple(box)


@lru_cache(maxsize=32)
def _splines(size: int, knots: int) -> NDArray[np.float64]:
    """What each knot contributes to each of `size` positions, `(knots, size)`."""
    unit = np.eye(knots)
    return np.stack([ndimage.zoom(row, size / knots, order=3, mode="nearest", grid_mode=True) for row in unit])


def _ellipse(h: Field3D, w: Field3D) -> Field3D:
    """Between an ellipse and a rectangle, as trunks are."""
    return np.asarray(1 - (np.abs(h) ** 2.6 + np.abs(w) ** 2.6) ** (1 / 2.6), dtype=np.float32)


def _blob(d: Field3D, h: Field3D, w: Field3D, centre: Point, size: Point, tilt: float = 0.0) -> Field3D:
    """An ellipsoid; `tilt` leans it in the coronal plane, in radians."""
    along, across = d - centre[0], w - centre[2]
    turned_d, turned_w = along * np.cos(tilt) + across * np.sin(tilt), across * np.cos(tilt) - along * np.sin(tilt)
    radius = np.sqrt((turned_d / size[0]) ** 2 + ((h - centre[1]) / size[1]) ** 2 + (turned_w / size[2]) ** 2)
    return np.asarray((1 - radius) * min(size), dtype=np.float32)


def _union(one: Field3D, other: Field3D, blend: float) -> Field3D:
    """Two bodies joined with a rounded seam."""
    near = np.maximum(blend - np.abs(one - other), 0) / blend
    return np.asarray(np.maximum(one, other) + near**2 * blend / 4, dtype=np.float32)
