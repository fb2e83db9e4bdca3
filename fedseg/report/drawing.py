"""A chart as lines and words, drawn once: HTML and PDF write the same marks, each in its own way."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.backend_bases import RendererBase
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.transforms import Bbox

Step = tuple[str, tuple[float, ...]]
"""`M`, `L`, `C` with the points that follow, or `Z`; of a path, in points, y upwards."""

LETTERS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "C", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}
EDGE = 3.0
"""Points by which a mark may stand out of its axes."""


@dataclass(frozen=True)
class Shape:
    """A line or an area."""

    steps: Sequence[Step]
    fill: str | None
    """As `#rrggbb`; None: a line only."""
    stroke: str | None
    width: float
    """In points."""
    dashes: tuple[float, ...]
    opacity: float


@dataclass(frozen=True)
class Words:
    """One line of text."""

    text: str
    x: float
    y: float
    """Of the base line, in points, y upwards."""
    anchor: str
    """Which part of the text is at `x`, `y`: start, middle or end."""
    angle: float
    """In degrees, anticlockwise."""
    size: float
    """In points."""
    colour: str


@dataclass(frozen=True)
class Drawing:
    """Marks in the order in which they cover each other, on no ground."""

    width: float
    """In points."""
    height: float
    marks: Sequence[Shape | Words] = field(default_factory=list)


def drawing_of(figure: Figure) -> Drawing:
    """Draw a figure, without the ground of it and of its axes."""
    figure.set_dpi(72)
    width, height = (float(inches) * 72 for inches in figure.get_size_inches())
    for patch in (figure.patch, *(axis.patch for axis in figure.axes)):
        patch.set_visible(False)
    recorder = _Recorder(width, height)
    figure.draw(recorder)
    return Drawing(width, height, recorder.marks)


class _Recorder(RendererBase):
    """What matplotlib draws with: it keeps what it is told."""

    def __init__(self, width: float, height: float) -> None:
        super().__init__()
        self._size = (width, height)
        self.marks: list[Shape | Words] = []

    def get_canvas_width_height(self) -> tuple[float, float]:
        return self._size

    def flipy(self) -> bool:
        return False

    def draw_path(self, gc: Any, path: Path, transform: Any, rgbFace: Any = None) -> None:
        width, rgb = float(gc.get_linewidth()), gc.get_rgb()
        fill = rgbFace if rgbFace is not None and to_rgba(rgbFace)[3] > 0 else None
        stroke = rgb if width > 0 and rgb[3] > 0 else None
        colour = fill if fill is not None else stroke
        if colour is None:
            return
        steps = _steps(path, transform, gc.get_clip_rectangle(), filled=fill is not None)
        opacity = float(gc.get_alpha() if gc.get_forced_alpha() else to_rgba(colour)[3])
        dashes = tuple(float(one) for one in gc.get_dashes()[1] or ())
        if steps:
            self.marks.append(Shape(steps, _hex(fill), _hex(stroke), width, dashes, opacity))

    def draw_text(self, gc: Any, x: float, y: float, s: str, prop: Any, angle: float,
                  ismath: Any = False, mtext: Any = None) -> None:  # fmt: skip
        width, _, _ = self.get_text_width_height_descent(s, prop, ismath)
        # in another font the text has another width: its middle stays where it is, or its end
        side = {"left": "start", "right": "end"}.get(
            mtext.get_ha() if mtext is not None and angle == 0 else "", "middle"
        )
        along = {"start": 0.0, "middle": 0.5, "end": 1.0}[side] * width
        place = (x + along * math.cos(math.radians(angle)), y + along * math.sin(math.radians(angle)))
        text = re.sub(r"\\mathdefault|[${}]", "", s) if ismath else s
        self.marks.append(Words(text, *place, side, float(angle), prop.get_size_in_points(), to_hex(gc.get_rgb())))

    def draw_image(self, gc: Any, x: float, y: float, im: Any, transform: Any = None) -> None:
        raise NotImplementedError("charts consist of lines and words; pictures are photos")


def _steps(path: Path, transform: Any, clip: Bbox | None, *, filled: bool) -> list[Step]:
    """A path in points, cut to its axes; marks at the edge of the axes stay whole."""
    placed = transform.transform_path(path) if transform is not None else path
    frame = None if clip is None else (clip.x0 - EDGE, clip.y0 - EDGE, clip.x1 + EDGE, clip.y1 + EDGE)
    if clip is not None and frame is not None and filled and not _inside(placed, frame):
        placed = placed.clip_to_bbox(clip)
    steps: list[Step] = []
    for points, code in placed.iter_segments(clip=None if filled else frame, simplify=False):
        numbers = tuple(float(one) for one in points)
        if code == Path.CURVE3:  # neither writer needs to know these
            (x, y), (u, v, p, q) = steps[-1][1][-2:], numbers
            numbers = (x + 2 * (u - x) / 3, y + 2 * (v - y) / 3, p + 2 * (u - p) / 3, q + 2 * (v - q) / 3, p, q)
        if code in LETTERS:
            steps.append((LETTERS[code], () if code == Path.CLOSEPOLY else numbers))
    return steps


def _hex(colour: Any) -> str | None:
    return None if colour is None else str(to_hex(colour))


def _inside(path: Path, frame: tuple[float, float, float, float]) -> bool:
    box = path.get_extents()
    return bool(box.x0 >= frame[0] and box.y0 >= frame[1] and box.x1 <= frame[2] and box.y1 <= frame[3])
