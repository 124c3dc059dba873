"""The report as a document: what it says, without HTML and without Markdown.

    Document ─► head: blocks
             └► sections ─► title, blocks          one block: heading, paragraph, table, cards, drawing, ...

`report.html` writes a document as a page, `report.markdown` as Markdown. Text is plain: a writer makes it inert.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = [
    "Alarm",
    "Badge",
    "Block",
    "Card",
    "Cards",
    "Cell",
    "Code",
    "Column",
    "Details",
    "Document",
    "Figure",
    "Figures",
    "Heading",
    "Items",
    "Pair",
    "Paragraph",
    "Section",
    "Strip",
    "Table",
    "Tone",
]

Tone: TypeAlias = Literal["", "ok", "bad", "words"]  # words: a figure that is no number


@dataclass(frozen=True)
class Heading:
    """A heading below a section's title."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """meta: what the report is of. lead: what was done. note: how to read what stands beside it."""

    text: str
    look: Literal["meta", "lead", "note"] = "note"


@dataclass(frozen=True)
class Alarm:
    """A warning that no reader should miss, with its reasons."""

    text: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Badge:
    """The verdict of the whole report."""

    verdict: str
    detail: str
    tone: Tone


@dataclass(frozen=True)
class Items:
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Strip:
    """All layers in a row, the replaced ones marked. Decoration: the text beside it says the same."""

    num_layers: int
    replaced: tuple[int, ...]


@dataclass(frozen=True)
class Card:
    """One figure of the headline, and how it came about."""

    title: str
    figure: str
    lines: tuple[str, ...] = ()
    tone: Tone = ""


@dataclass(frozen=True)
class Cards:
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Column:
    """number: to the right. wrap, detail, value: text that may take several lines, of different widths."""

    title: str
    look: Literal["", "number", "wrap", "detail", "value"] = ""

    @classmethod
    def numbers(cls, *titles: str) -> tuple[Column, ...]:
        """A column of numbers for each title."""
        return tuple(cls(title, "number") for title in titles)


@dataclass(frozen=True)
class Cell:
    text: str
    tone: Tone = ""

    @classmethod
    def verdict(cls, text: str, *, good: str, bad: str) -> Cell:
        """A verdict in its colour."""
        return cls(text, "ok" if text == good else "bad" if text == bad else "")


@dataclass(frozen=True)
class Table:
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"a row of this table has not {len(self.columns)} cells: {self.rows}")

    @classmethod
    def of(cls, columns: Iterable[Column | str], rows: Iterable[Iterable[Cell | str]]) -> Table:
        """The same, where a plain column or cell may be given by its text."""
        return cls(
            tuple(Column(c) if isinstance(c, str) else c for c in columns),
            tuple(tuple(Cell(c) if isinstance(c, str) else c for c in row) for row in rows),
        )


@dataclass(frozen=True)
class Code:
    """One line of a shell."""

    text: str


@dataclass(frozen=True)
class Figure:
    """A drawing by its name; a writer without that drawing leaves it out."""

    name: str
    caption: str


@dataclass(frozen=True)
class Figures:
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Details:
    """Blocks that a reader opens."""

    summary: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Pair:
    """Two columns, if the page is wide enough."""

    left: tuple[Block, ...]
    right: tuple[Block, ...]


Block: TypeAlias = (
    "Heading | Paragraph | Alarm | Badge | Items | Strip | Cards | Table | Code | Figures | Details | Pair"
)


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """title: of the model. head: what stands between title and first section."""

    title: str
    head: tuple[Block, ...]
    sections: tuple[Section, ...]
