"""What a report is made of: filled once, written as HTML and as PDF."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedseg.report.drawing import Drawing


@dataclass(frozen=True)
class Paragraph:
    """Sentences."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """Short statements."""

    items: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Cells are texts already; those of all columns but the first `words` stand at the right."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


@dataclass(frozen=True)
class Charts:
    """One chart, or several small ones side by side, and in words what they show."""

    drawings: Sequence[Drawing]
    caption: str
    alts: Sequence[str]
    """For those who cannot see: one for each drawing."""
    legend: Sequence[tuple[str, str]] = ()
    """Colours and what they stand for, where the drawings do not say so themselves."""
    title: str = ""


@dataclass(frozen=True)
class Photo:
    """Pixels that no drawing could replace, as JPEG."""

    jpeg: bytes
    caption: str
    alt: str


@dataclass(frozen=True)
class Code:
    """Commands."""

    text: str


Block = Paragraph | Bullets | Facts | Table | Charts | Photo | Code


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """Its name in links."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


@dataclass(frozen=True)
class Report:
    """The whole."""

    title: str
    subtitle: str
    sections: Sequence[Section]
