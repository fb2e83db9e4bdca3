"""The same report for paper: A4, text that can be searched, fonts inside."""

import html
import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image as Pixels
from reportlab.lib import colors
from reportlab.lib.enums import TA_RIGHT
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.ttfonts import TTFont
from reportlab.platypus import Flowable, Image, SimpleDocTemplate, Spacer
from reportlab.platypus import Paragraph as Text
from reportlab.platypus import Table as Grid

from fedseg.report.document import Block, Bullets, Charts, Code, Facts, Paragraph, Photo, Report, Table
from fedseg.report.drawing import Drawing, Shape, Words

MARGIN = 18 * mm
WIDTH = A4[0] - 2 * MARGIN
TALLEST = A4[1] - 2 * MARGIN - 30 * mm
GAP = 6.0
"""Points between columns."""
SIZES = (8.0, 7.0, 6.0)
"""Of the letters in tables: the largest one with which no word is broken."""
SHORT = 20
"""Rows that stay on one page."""
NARROW = [("LEFTPADDING", (0, 0), (-1, -1), 0), ("RIGHTPADDING", (0, 0), (-1, -1), 0)]
LINE, MUTED = colors.HexColor("#c4cad1"), colors.HexColor("#55606e")


def to_pdf(report: Report) -> bytes:
    """The report as a document of A4 pages."""
    data, styles = io.BytesIO(), _styles()
    pages = SimpleDocTemplate(
        data, pagesize=A4, leftMargin=MARGIN, rightMargin=MARGIN, topMargin=MARGIN, bottomMargin=MARGIN,
        title=report.title, author="fedseg", invariant=1,
    )  # fmt: skip
    story: list[Flowable] = [_text(report.title, styles["title"]), _text(report.subtitle, styles["muted"])]
    for section in report.sections:
        story.append(_text(section.title, styles["heading"]))
        story += [flowable for block in section.blocks for flowable in _block(block, styles)]
    pages.build(story, onFirstPage=_number, onLaterPages=_number)
    return data.getvalue()


def _block(block: Block, styles: dict[str, ParagraphStyle]) -> list[Flowable]:
    match block:
        case Paragraph(text):
            return [_text(text, styles["body"])]
        case Bullets(items):
            return [Text(html.escape(item), styles["bullet"], bulletText="•") for item in items]
        case Facts(items):
            rows = [(_text(name, styles["muted"]), _text(value, styles["cell"])) for name, value in items]
            return [_ruled(rows, [0.3 * WIDTH, 0.7 * WIDTH]), Spacer(0, 3 * mm)]
        case Code(text):
            return [_text(line, styles["code"]) for line in text.splitlines()]
        case Table():
            return _table(block, styles)
        case Charts():
            return _charts(block, styles)
        case Photo():
            return _photo(block, styles)


def _table(table: Table, styles: dict[str, ParagraphStyle]) -> list[Flowable]:
    size = next((size for size in SIZES if sum(_least(table, size)) <= WIDTH), SIZES[-1])

    def cell(text: str, column: int, *, head: bool = False) -> Flowable:
        name = ("head" if head else "cell") + ("" if column < table.words else " right")
        return _text(text, ParagraphStyle(name, styles[name], fontSize=size, leading=1.3 * size))

    rows = [[cell(name, n, head=True) for n, name in enumerate(table.head)]]
    rows += [[cell(text, n) for n, text in enumerate(row)] for row in table.rows]
    grid = _ruled(rows, _widths(table, size))
    grid.keepWithNext = len(rows) <= SHORT  # with the empty space below it, that is, on one page
    return [_text(table.caption, styles["caption"]), grid, Spacer(0, 4 * mm)]


def _widths(table: Table, size: float) -> list[float]:
    """Columns wide enough for their longest number or word; what is left goes to those with the longest lines."""
    columns = [[heading, *(row[n] for row in table.rows)] for n, heading in enumerate(table.head)]
    least, wanted = _least(table, size), [max(_wide(text, size) for text in column) for column in columns]
    if sum(wanted) <= WIDTH:
        return [want + (WIDTH - sum(wanted)) / len(wanted) for want in wanted]
    share = max(0.0, WIDTH - sum(least)) / (sum(wanted) - sum(least))
    widths = [need + share * (want - need) for need, want in zip(least, wanted, strict=True)]
    return [WIDTH * one / sum(widths) for one in widths]


def _least(table: Table, size: float) -> list[float]:
    """What each column needs so that no number and no word is broken."""
    least = []
    for n, heading in enumerate(table.head):
        texts = [row[n] for row in table.rows]
        whole = texts if n >= table.words else [word for text in texts for word in text.split()]
        least.append(max(_wide(text, size) for text in (*whole, *heading.split(), "")))
    return least


def _wide(text: str, size: float) -> float:
    return float(pdfmetrics.stringWidth(text, "Sans", size)) + GAP


def _ruled(rows: list[Any], widths: list[float]) -> Flowable:
    style: list[Any] = [
        ("LINEBELOW", (0, 0), (-1, -1), 0.4, LINE),
        ("VALIGN", (0, 0), (-1, -1), "TOP"),
        ("LEFTPADDING", (0, 0), (-1, -1), 0),
        ("RIGHTPADDING", (0, 0), (-1, -1), GAP - 1),
        ("TOPPADDING", (0, 0), (-1, -1), 2),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 3),
    ]
    return Grid(rows, colWidths=widths, style=style, repeatRows=1, hAlign="LEFT")


def _charts(charts: Charts, styles: dict[str, ParagraphStyle]) -> list[Flowable]:
    drawn: list[Flowable] = [_Chart(drawing) for drawing in charts.drawings]
    columns = max(1, int(WIDTH // max(chart.width for chart in drawn)))
    lines = [drawn[n : n + columns] for n in range(0, len(drawn), columns)]
    if len(drawn) > 1:
        full = [line + [""] * (columns - len(line)) for line in lines]
        drawn = [Grid(full, colWidths=[WIDTH / columns] * columns, style=NARROW, hAlign="LEFT")]
    names = "&nbsp;&nbsp; ".join(
        f'<font color="{colour}">\u25a0</font> {html.escape(name)}' for colour, name in charts.legend
    )
    legend = [Text(names, styles["muted"])] if names else []
    title = [_text(charts.title, styles["caption"])] if charts.title else []
    return _together(*title, *legend, *drawn, _text(charts.caption, styles["muted"]), Spacer(0, 3 * mm))


def _photo(photo: Photo, styles: dict[str, ParagraphStyle]) -> list[Flowable]:
    with Pixels.open(io.BytesIO(photo.jpeg)) as pixels:
        wide, high = pixels.size
    scale = min(WIDTH / wide, TALLEST / high)
    drawn = Image(io.BytesIO(photo.jpeg), wide * scale, high * scale, hAlign="LEFT")
    return _together(drawn, _text(photo.caption, styles["muted"]), Spacer(0, 3 * mm))


def _together(*parts: Flowable) -> list[Flowable]:
    """On one page, and on that of a heading above them."""
    for part in parts[:-1]:
        part.keepWithNext = True
    return list(parts)


class _Chart(Flowable):
    """A drawing in lines and words."""

    def __init__(self, drawing: Drawing) -> None:
        super().__init__()
        self._drawing = drawing
        self._scale = min(1.0, WIDTH / drawing.width, TALLEST / drawing.height)
        self.width, self.height = drawing.width * self._scale, drawing.height * self._scale

    def wrap(self, _wide: float, _high: float) -> tuple[float, float]:
        """What it takes, in points."""
        return self.width, self.height

    def draw(self) -> None:
        """Onto the canvas."""
        self.canv.scale(self._scale, self._scale)
        for mark in self._drawing.marks:
            self.canv.saveState()
            if isinstance(mark, Shape):
                _draw_shape(self.canv, mark)
            else:
                _draw_words(self.canv, mark)
            self.canv.restoreState()


def _draw_shape(canvas: Any, shape: Shape) -> None:
    path = canvas.beginPath()
    steps = {"M": path.moveTo, "L": path.lineTo, "C": path.curveTo, "Z": path.close}
    for letter, points in shape.steps:
        steps[letter](*points)
    if shape.fill is not None:
        canvas.setFillColor(colors.HexColor(shape.fill))
    if shape.stroke is not None:
        canvas.setStrokeColor(colors.HexColor(shape.stroke))
        canvas.setLineWidth(shape.width)
        canvas.setDash(list(shape.dashes))
    canvas.setFillAlpha(shape.opacity)  # after the colours, which set it to 1
    canvas.setStrokeAlpha(shape.opacity)
    canvas.drawPath(path, stroke=int(shape.stroke is not None), fill=int(shape.fill is not None))


def _draw_words(canvas: Any, words: Words) -> None:
    canvas.setFont("Sans", words.size)
    canvas.setFillColor(colors.HexColor(words.colour))
    canvas.translate(words.x, words.y)
    canvas.rotate(words.angle)
    {"start": canvas.drawString, "middle": canvas.drawCentredString, "end": canvas.drawRightString}[words.anchor](
        0, 0, words.text
    )


def _text(text: str, style: ParagraphStyle) -> Text:
    return Text(html.escape(text), style)


def _number(canvas: Any, document: Any) -> None:
    canvas.setFont("Sans", 8)
    canvas.setFillColor(MUTED)
    canvas.drawRightString(A4[0] - MARGIN, 10 * mm, str(document.page))


@lru_cache
def _styles() -> dict[str, ParagraphStyle]:
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # DejaVu, free, and it has the signs that numbers need
    for name, file in (("Sans", "DejaVuSans"), ("Sans-Bold", "DejaVuSans-Bold"), ("Mono", "DejaVuSansMono")):
        pdfmetrics.registerFont(TTFont(name, str(fonts / f"{file}.ttf")))
    body = ParagraphStyle("body", fontName="Sans", fontSize=9.5, leading=14, spaceAfter=6)
    cell = ParagraphStyle("cell", body, fontSize=8, leading=10.5, spaceAfter=0)
    head = ParagraphStyle("head", cell, textColor=MUTED)
    return {
        "title": ParagraphStyle("title", body, fontName="Sans-Bold", fontSize=18, leading=23, spaceAfter=3),
        "heading": ParagraphStyle(
            "heading", body, fontName="Sans-Bold", fontSize=12.5, leading=17, spaceBefore=12, keepWithNext=1
        ),
        "caption": ParagraphStyle(
            "caption", body, fontName="Sans-Bold", fontSize=9, leading=12, spaceAfter=3, keepWithNext=1
        ),
        "body": body,
        "bullet": ParagraphStyle("bullet", body, leftIndent=12, bulletIndent=2, spaceAfter=3),
        "muted": ParagraphStyle("muted", body, fontSize=8.5, leading=11.5, textColor=MUTED),
        "code": ParagraphStyle("code", body, fontName="Mono", fontSize=8, leading=11, spaceAfter=1),
        "cell": cell,
        "cell right": ParagraphStyle("cell right", cell, alignment=TA_RIGHT),
        "head": head,
        "head right": ParagraphStyle("head right", head, alignment=TA_RIGHT),
    }
