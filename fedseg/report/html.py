"""A report as one HTML file that asks nobody for anything: no script, pictures inside, light and dark, paper too."""

import base64
import hashlib
import html
from importlib.resources import files

from fedseg.report.document import Block, Bullets, Charts, Code, Facts, Paragraph, Photo, Report, Section, Table
from fedseg.report.svg import swatch, to_svg


def to_html(report: Report) -> str:
    """The report as a document."""
    style = (files("fedseg.report") / "report.css").read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{allowed}'; img-src data:; base-uri 'none'; form-action 'none'"
    contents = "".join(f'<li><a href="#{s.anchor}">{_text(s.title)}</a></li>' for s in report.sections)
    body = "".join(_section(section) for section in report.sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(report.title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f'<header><div class="wrap"><h1>{_text(report.title)}</h1>'
        f'<p class="subtitle">{_text(report.subtitle)}</p></div></header>\n'
        f'<div class="wrap columns"><nav aria-label="Contents"><ol>{contents}</ol></nav>\n<main>{body}</main></div>\n'
        "</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    return f'\n<section id="{section.anchor}"><h2>{_text(section.title)}</h2>\n{blocks}\n</section>'


def _block(block: Block) -> str:
    match block:
        case Paragraph(text):
            return f"<p>{_text(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_text(item)}</li>" for item in items) + "</ul>"
        case Facts(items):
            pairs = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in items)
            return f"<dl>{pairs}</dl>"
        case Code(text):
            return f'<pre tabindex="0"><code>{_text(text)}</code></pre>'
        case Table():
            return _table(block)
        case Charts():
            return _charts(block)
        case Photo(jpeg, caption, alt):
            source = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
            return f'<figure><img src="{source}" alt="{_text(alt)}"><figcaption>{_text(caption)}</figcaption></figure>'


def _table(table: Table) -> str:
    def kind(column: int) -> str:
        return "" if column < table.words else ' class="number"'

    head = "".join(f'<th scope="col"{kind(n)}>{_text(name)}</th>' for n, name in enumerate(table.head))
    rows = []
    for row in table.rows:
        cells = "".join(f"<td{kind(n)}>{_text(cell)}</td>" for n, cell in enumerate(row[1:], start=1))
        rows.append(f'<tr><th scope="row">{_text(row[0])}</th>{cells}</tr>')
    name = _text(table.caption)
    return (
        f'<p class="caption">{name}</p><div class="scroll" tabindex="0" role="region" aria-label="{name}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _charts(charts: Charts) -> str:
    drawn = [to_svg(drawing, alt) for drawing, alt in zip(charts.drawings, charts.alts, strict=True)]
    caption = _text(charts.caption)
    if len(drawn) == 1:
        body = f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">{drawn[0]}</div>'
    else:
        body = f'<div class="panels">{"".join(drawn)}</div>'
    names = "".join(f"<li>{swatch(colour)} {_text(name)}</li>" for colour, name in charts.legend)
    legend = f'<ul class="legend">{names}</ul>' if names else ""
    title = f'<p class="caption">{_text(charts.title)}</p>' if charts.title else ""
    return f"<figure>{title}{legend}{body}<figcaption>{caption}</figcaption></figure>"


def _text(text: str) -> str:
    return html.escape(text, quote=True)
