"""Blocks -> GitHub-flavoured Markdown. Drawings and decoration are left out."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nbl_export.report.blocks import (
    Alarm,
    Badge,
    Block,
    Card,
    Cards,
    Code,
    Column,
    Details,
    Document,
    Figures,
    Heading,
    Items,
    Pair,
    Paragraph,
    Strip,
    Table,
)

__all__ = ["document", "escaped", "written"]


def document(page: Document) -> str:
    """The whole document as a file."""
    parts = [f"# {escaped(page.title)}", written(page.head)]
    for section in page.sections:
        parts += [f"## {escaped(section.title)}", written(section.blocks)]
    return _joined(parts) + "\n"


def written(blocks: Iterable[Block]) -> str:
    """Blocks with a blank line between them."""
    return _joined(_block(block) for block in blocks)


def escaped(text: object) -> str:
    """Text without effect as Markdown or HTML, on one line."""
    return re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", " ".join(str(text).split()))


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
            return _table(block)
        case Code(text):
            return "\n".join(f"    {line}" for line in text.splitlines())
        case Details(summary, blocks):
            return _joined((f"### {escaped(summary)}", written(blocks)))
        case Pair(left, right):
            return written((*left, *right))
        case Strip() | Figures():
            return ""


def _line(text: str) -> str:
    """Text that begins a line: neither heading, nor list, nor rule, nor fence."""
    return re.sub(r"^(\d+(?=[.)](?:\s|$))|(?=[-+#=~]))", r"\1\\", escaped(text))


def _items(texts: Iterable[str]) -> str:
    return _joined(f"- {text}" for text in texts)


def _card(card: Card) -> str:
    figure = f"{escaped(card.title)} **{escaped(card.figure)}**"
    return " · ".join((figure, *map(escaped, card.lines)))


def _table(table: Table) -> str:
    rules = ("---:" if column.look == "number" else "---" for column in table.columns)
    rows = ((escaped(cell.text) for cell in row) for row in table.rows)
    return "\n".join(_row(cells) for cells in (map(_title, table.columns), rules, *rows))


def _title(column: Column) -> str:
    return escaped(column.title)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
