"""Neighbouring slices as channels (2.5D): what a network of images gets to see of the third dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Slicing:
    """How many slices a network sees at once, and along which axis."""

    count: int = 1
    """Odd; 1: each slice alone."""
    axis: int = 0
    """0, 1, 2 for D, H, W."""

    @property
    def margin(self) -> int:
        """Slices that are needed on either side of a patch."""
        return self.count // 2

    def stack(self, image_BCDHW: Tensor) -> Tensor:
        """Make neighbours channels: each channel becomes `count` of them, from the slice furthest before to that behind.

        Args:
            image_BCDHW: with `margin` slices more on either side than will be left.

        Returns:
            `(B, C * count, D, H, W)`.
        """
        if self.count == 1:
            return image_BCDHW
        return image_BCDHW.unfold(2 + self.axis, self.count, 1).movedim(-1, 2).flatten(1, 2)

    def widen(self, array_CDHW: NDArray[np.float32], before: int, behind: int) -> NDArray[np.float32]:
        """Repeat the first slice `before` times and the last one `behind` times."""
        if before == behind == 0:
            return array_CDHW
        return np.pad(array_CDHW, [(before, behind) if at == 1 + self.axis else (0, 0) for at in range(4)], mode="edge")

    def inner(self, array_DHW: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Take the margin off again."""
        if self.margin == 0:
            return array_DHW
        return array_DHW[tuple(slice(self.margin, -self.margin) if at == self.axis else slice(None) for at in range(3))]


EACH_ALONE = Slicing()
"""No neighbours."""
