"""The report as a document: what it says as blocks, and the two writers of a document.

    Document ─► head: blocks            one block: heading, paragraph, table, cards, drawing, ...
      │      └► sections ─► title, blocks
      ├► html: one page without script, which fetches nothing; report.html.jinja has its style and its tags
      └► markdown: GitHub-flavoured; drawings and decoration are left out

Text of a block is plain: a writer makes it inert.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import jinja2
from markupsafe import Markup

from nbl_export.report.table import Table, Tone, escaped
from nbl_export.trust.terminal import visible

__all__ = [
    "Alarm",
    "Badge",
    "Bar",
    "Block",
    "Card",
    "Cards",
    "Code",
    "Details",
    "Document",
    "Figure",
    "Heading",
    "Items",
    "Pair",
    "Paragraph",
    "Section",
    "Strip",
    "html",
    "markdown",
    "written",
]


@dataclass(frozen=True)
class Heading:
    """A heading below a section's title."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """meta: what the report is of. lead: what was done. note: how to read what stands beside it. said: by a model."""

    text: str
    look: Literal["meta", "lead", "note", "said"] = "note"


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
    """All layers in a row, the replaced ones in the colour of their kind. Decoration: text beside it says the same."""

    num_layers: int
    kinds: Mapping[int, str]


@dataclass(frozen=True)
class Bar:
    """One of the bars of a card. share: its length, of the longest. Decoration: a line of the card says the same."""

    variant: str
    text: str
    share: float


@dataclass(frozen=True)
class Card:
    """One figure of the headline, and how it came about."""

    title: str
    figure: str
    lines: tuple[str, ...] = ()
    tone: Tone = ""
    bars: tuple[Bar, ...] = ()


@dataclass(frozen=True)
class Cards:
    cards: tuple[Card, ...]


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
    "Heading | Paragraph | Alarm | Badge | Items | Strip | Cards | Table | Code | Figure | Details | Pair"
)


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        """What a link to the section names."""
        return re.sub(r"\W+", "-", self.title.lower())


@dataclass(frozen=True)
class Document:
    """title: of the model. head: what stands between title and first section."""

    title: str
    head: tuple[Block, ...]
    sections: tuple[Section, ...]


def html(page: Document, drawings: Mapping[str, str]) -> str:
    """The document as an HTML page; its text is inert in it.

    Args:
        drawings: <svg> elements by the names of `Figure`.
    """
    source = importlib.resources.files("nbl_export.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else visible(value),
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    trusted = {name: Markup(svg) for name, svg in drawings.items()}
    return environment.from_string(source).render(page=page, drawings=trusted)


def markdown(page: Document) -> str:
    """The document as a file of Markdown."""
    parts = [f"# {escaped(page.title)}", written(page.head)]
    for section in page.sections:
        parts += [f"## {escaped(section.title)}", written(section.blocks)]
    return _joined(parts) + "\n"


def written(blocks: Iterable[Block]) -> str:
    """Blocks with a blank line between them."""
    return _joined(_block(block) for block in blocks)


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part)


def _block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"### {escaped(text)}"
        case Paragraph(text):
            return _line(text)
        case Alarm(text, reasons):
            return _joined((_line(text), _items(map(_line, reasons))))
        case Badge(verdict, detail):
            return f"**{escaped(verdict)}** · {escaped(detail)}"
        case Items(texts):
            return _items(map(_line, texts))
        case Cards(cards):
            return _items(map(_card, cards))
        case Table():
            return block.markdown()
        case Code(text):
            return "\n".join(f"    {visible(line)}" for line in text.splitlines())
        case Details(summary, blocks):
            return _joined((f"### {escaped(summary)}", written(blocks)))
        case Pair(left, right):
            return written((*left, *right))
        case Strip() | Figure():
            return ""


def _line(text: str) -> str:
    """Text that begins a line: neither heading, nor list, nor rule, nor fence."""
    return re.sub(r"^(\d+(?=[.)](?:\s|$))|(?=[-+#=~]))", r"\1\\", escaped(text))


def _items(texts: Iterable[str]) -> str:
    return _joined(f"- {text}" for text in texts)


def _card(card: Card) -> str:
    figure = f"{escaped(card.title)} **{escaped(card.figure)}**"
    return " · ".join((figure, *map(escaped, card.lines)))
