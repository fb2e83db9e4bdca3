"""Charts for the page: colours are those of the page's style, in the light and in the dark; text is text."""

import html
from collections.abc import Sequence

from fedseg.report.drawing import Drawing, Shape, Words
from fedseg.report.figures import COLOURS, LOCAL, POOLED

WIDE = 260.0
"""Points from which a chart would be illegible if a phone's width were all that it had."""
INKS = {colour: f"var(--series-{number})" for number, colour in enumerate(COLOURS, start=1)} | {
    POOLED: "var(--pooled)",
    LOCAL: "var(--local)",
    "#000000": "var(--text)",
    "#444444": "var(--muted)",
    "#b0b0b0": "var(--muted)",
    "#bbbbbb": "var(--muted)",
    "#ffffff": "var(--card)",
}
"""What stands for what on the page; other colours are the same in the light and in the dark."""


def to_svg(drawing: Drawing, alt: str) -> str:
    """A drawing as an element of a page, without styles of its own, which the page's policy would forbid."""
    marks = "".join(
        _shape(mark, drawing) if isinstance(mark, Shape) else _words(mark, drawing) for mark in drawing.marks
    )
    size = f'width="{drawing.width * 4 / 3:.0f}" height="{drawing.height * 4 / 3:.0f}"'
    kind = ' class="wide"' if drawing.width > WIDE else ""
    box = f"0 0 {drawing.width:g} {drawing.height:g}"
    return f'<svg{kind} role="img" aria-label="{html.escape(alt, quote=True)}" viewBox="{box}" {size}>{marks}</svg>'


def swatch(colour: str) -> str:
    """A spot of colour for a legend."""
    ink = INKS.get(colour, colour)
    return f'<svg aria-hidden="true" viewBox="0 0 8 8" width="11" height="11"><rect width="8" height="8" fill="{ink}"/></svg>'


def _shape(shape: Shape, drawing: Drawing) -> str:
    path = "".join(f"{letter}{_points(points, drawing)}" for letter, points in shape.steps)
    ink = f' fill="{_ink(shape.fill)}"'
    if shape.stroke is not None:
        ink += f' stroke="{_ink(shape.stroke)}" stroke-width="{shape.width:g}"'
    if shape.dashes and shape.stroke is not None:
        ink += f' stroke-dasharray="{" ".join(f"{one:.3g}" for one in shape.dashes)}"'
    if shape.opacity < 1:
        ink += f' opacity="{shape.opacity:.3g}"'
    return f'<path d="{path}"{ink}/>'


def _words(words: Words, drawing: Drawing) -> str:
    x, y = words.x, drawing.height - words.y
    turned = f' transform="rotate({-words.angle:g} {x:.1f} {y:.1f})"' if words.angle else ""
    side = f' text-anchor="{words.anchor}"' if words.anchor != "start" else ""
    text = html.escape(words.text)
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{words.size:.3g}" fill="{_ink(words.colour)}"{side}{turned}>{text}</text>'


def _points(points: Sequence[float], drawing: Drawing) -> str:
    places = (drawing.height - one if number % 2 else one for number, one in enumerate(points))
    return " ".join(f"{one:.1f}".removesuffix(".0") for one in places)


def _ink(colour: str | None) -> str:
    return "none" if colour is None else INKS.get(colour, colour)
