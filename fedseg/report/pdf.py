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
from reportlab.platypus import Flowable, Image, KeepTogether, SimpleDocTemplate, Spacer
from reportlab.platypus import Paragraph as Text
from reportlab.platypus import Table as Grid

from fedseg.report.document import Block, Bullets, Code, Facts, Paragraph, Picture, Report, Table

DPI = 200
MARGIN = 18 * mm
WIDTH = A4[0] - 2 * MARGIN
TALLEST = A4[1] - 2 * MARGIN - 30 * mm
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
        blocks = [flowable for block in section.blocks for flowable in _block(block, styles)]
        heading = _text(section.title, styles["heading"])
        story += [KeepTogether([heading, *blocks[:1]]), *blocks[1:]]
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
        case Picture():
            return _picture(block, styles)


def _table(table: Table, styles: dict[str, ParagraphStyle]) -> list[Flowable]:
    def cell(text: str, column: int, *, head: bool = False) -> Flowable:
        side = "" if column < table.words else " right"
        return _text(text, styles[("head" if head else "cell") + side])

    rows = [[cell(name, n, head=True) for n, name in enumerate(table.head)]]
    rows += [[cell(text, n) for n, text in enumerate(row)] for row in table.rows]
    lengths = [max(len(row[n]) for row in (table.head, *table.rows)) for n in range(len(table.head))]
    shares = [min(max(length, 6), 26) for length in lengths]
    widths = [WIDTH * share / sum(shares) for share in shares]
    return [_text(table.caption, styles["caption"]), _ruled(rows, widths), Spacer(0, 4 * mm)]


def _ruled(rows: list[Any], widths: list[float]) -> Flowable:
    style: list[Any] = [
        ("LINEBELOW", (0, 0), (-1, -1), 0.4, LINE),
        ("VALIGN", (0, 0), (-1, -1), "TOP"),
        ("LEFTPADDING", (0, 0), (-1, -1), 0),
        ("RIGHTPADDING", (0, 0), (-1, -1), 4),
        ("TOPPADDING", (0, 0), (-1, -1), 2),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 3),
    ]
    return Grid(rows, colWidths=widths, style=style, repeatRows=1, hAlign="LEFT")


def _picture(picture: Picture, styles: dict[str, ParagraphStyle]) -> list[Flowable]:
    data = io.BytesIO()
    if isinstance(picture.figure, Path):
        pixels = Pixels.open(picture.figure).convert("RGB")
        pixels.save(data, "JPEG", quality=88)
        wide, high = (72 / DPI * side for side in pixels.size)
        wide, high = wide * WIDTH / wide, high * WIDTH / wide
    else:
        kind: dict[str, Any] = {"format": "jpeg", "pil_kwargs": {"quality": 88}} if picture.photo else {"format": "png"}
        picture.figure.savefig(data, dpi=DPI, **kind)
        wide, high = (float(inches) * 72 for inches in picture.figure.get_size_inches())
    data.seek(0)
    scale = min(1.0, WIDTH / wide, TALLEST / high)
    drawn = Image(data, wide * scale, high * scale, hAlign="LEFT")
    return [KeepTogether([drawn, _text(picture.caption, styles["muted"])]), Spacer(0, 3 * mm)]


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
        "heading": ParagraphStyle("heading", body, fontName="Sans-Bold", fontSize=12.5, leading=17, spaceBefore=12),
        "caption": ParagraphStyle("caption", body, fontName="Sans-Bold", fontSize=9, leading=12, spaceAfter=3),
        "body": body,
        "bullet": ParagraphStyle("bullet", body, leftIndent=12, bulletIndent=2, spaceAfter=3),
        "muted": ParagraphStyle("muted", body, fontSize=8.5, leading=11.5, textColor=MUTED),
        "code": ParagraphStyle("code", body, fontName="Mono", fontSize=8, leading=11, spaceAfter=1),
        "cell": cell,
        "cell right": ParagraphStyle("cell right", cell, alignment=TA_RIGHT),
        "head": head,
        "head right": ParagraphStyle("head right", head, alignment=TA_RIGHT),
    }
