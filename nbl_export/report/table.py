"""A table of cells, for every reader.

Table ─► __rich__: a terminal   ├► markdown   └► report.html.jinja: HTML
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from rich.box import HEAVY_HEAD
from rich.table import Table as RichTable

from nbl_export.trust.terminal import visible

__all__ = ["Cell", "Column", "Shown", "Table", "Tone", "escaped", "facts"]

Tone: TypeAlias = Literal["", "ok", "bad", "words"]  # words: a figure that is no number


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
    """Cells in columns. title: on a terminal; a page has headings. totals: number of last rows under a line."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    totals: int = 0

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"a row of this table has not {len(self.columns)} cells: {self.rows}")

    @classmethod
    def of(cls, columns: Iterable[object], rows: Iterable[Iterable[object]], title: str = "", totals: int = 0) -> Table:
        """The same of texts and values: a column by its title, a cell by its value; None is an empty cell."""
        return cls(
            tuple(c if isinstance(c, Column) else Column(str(c)) for c in columns),
            tuple(tuple(c if isinstance(c, Cell) else Cell("" if c is None else str(c)) for c in row) for row in rows),
            title,
            totals,
        )

    def __rich__(self) -> RichTable:
        """The table on a terminal; without titles of columns it has no lines."""
        ruled = any(column.title for column in self.columns)
        drawn = RichTable(title=self.title or None, show_header=ruled, box=HEAVY_HEAD if ruled else None)
        for column in self.columns:  # a path cut short names nothing
            drawn.add_column(column.title, justify="right" if column.look == "number" else "left", overflow="fold")
        for left, row in zip(range(len(self.rows), 0, -1), self.rows, strict=True):
            drawn.add_row(*(cell.text for cell in row), end_section=left == self.totals + 1)
        return drawn

    def markdown(self) -> str:
        """GitHub-flavoured Markdown."""
        rule = ["---:" if column.look == "number" else "---" for column in self.columns]
        lines = [[escaped(c.title) for c in self.columns], rule, *([escaped(c.text) for c in r] for r in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


Shown: TypeAlias = tuple[Table | str, ...]  # what a command prints: tables, and lines between them


def facts(rows: Iterable[tuple[str, object]]) -> Table:
    """Names and values without titles."""
    return Table.of(("", ""), rows)


def escaped(text: object) -> str:
    """Text without effect as Markdown or HTML, on one line."""
    return re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", " ".join(visible(str(text)).split()))
