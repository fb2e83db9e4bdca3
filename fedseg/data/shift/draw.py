"""Randomness that is fixed: what a site is, and what happens in one case, by name and seed and nothing else."""

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Draw:
    """The random numbers of one effect in one case.

    Severity decides nothing here: a stronger effect is the same one, only more of it.
    """

    site: np.random.Generator
    """The same for every case of the site: axes, directions, places."""
    case: np.random.Generator
    """The case's own."""
    axis: int | None = None
    """0, 1, 2 (D, H, W) where the profile names one."""

    def pick_axis(self) -> int:
        """The site's axis for this effect."""
        drawn = int(self.site.integers(3))
        return drawn if self.axis is None else self.axis


def draw_for(seed: int, effect: str, case: str, axis: str = "auto", channel: int = 0) -> Draw:
    """The same draw for the same arguments, in every process and epoch."""
    own = None if axis == "auto" else "DHW".index(axis)
    return Draw(_generator(seed, effect), _generator(seed, effect, case, channel), own)


def _generator(*parts: object) -> np.random.Generator:
    text = "\x1f".join(str(part) for part in parts)
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))
