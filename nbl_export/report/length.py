"""Quality at length: tables of loss by position, retrieval and copying, and what they mean.

The values are those that `evaluation.results` writes as `length`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nbl_export.records.quality import describe_interval
from nbl_export.report import words
from nbl_export.report.document import Block, Heading, Paragraph
from nbl_export.report.table import Column, Table

__all__ = ["in_short", "length", "notes", "tables"]

Found = Sequence[Mapping[str, Any]]


def length(found: Found) -> Iterator[Block]:
    """The part of the report; nothing if quality at length was not measured."""
    if not found:
        return
    yield Heading("Quality at length")
    yield Paragraph(
        "A linear layer sees one token, so long-range context reaches it only through the kept layers. "
        "Loss by position is that of windows of a text. In retrieval, a key of five digits stands in the first half of "
        "a text, and the end asks for the key. A key is correct if greedy decoding gives all of its digits. "
        "In copying, random tokens are read twice, and the tokens of the second time count. "
        "Brackets hold a 95% interval over windows, keys or sequences, paired by item."
    )
    yield from map(Paragraph, notes(found))
    for table in tables(found):
        yield Heading(table.title)
        yield table


def in_short(found: Found) -> Iterator[str]:
    """What the graphs lose at the greatest length, a line each for loss by position and for retrieval."""
    for one in found:
        last = one["rows"][-1]
        if not last["differences"]:
            continue
        text = one["task"].partition(":")[2]
        if one["test"] == "position":
            place = words.positions([row["tokens"] for row in one["rows"]])[-1]
            yield f"{_difference(last, 'increase')} on {text}, positions {place}"
        if one["test"] == "retrieval":
            new, old = (f"{last['figures'][variant]['correct']:.0%}" for variant in ("nbl", "original"))
            yield f"finds {new} of the keys in {last['tokens']:,} tokens, the original {old}"


def notes(found: Found) -> Iterator[str]:
    """The warnings, one line each."""
    yield from (f"Note: {warning}." for one in found for warning in one["warnings"])


def tables(found: Found) -> Iterator[Table]:
    """Loss by position, then retrieval and copying; a table without rows is left out."""
    positions = [row for one in found if one["test"] == "position" for row in _positions(one)]
    if positions:
        columns = Column.numbers("Positions", "Windows", "Perplexity original", "Perplexity NBL", "Increase")
        yield Table.of((Column("Text", "wrap"), *columns), positions, "Loss by position")
    items = [row for one in found if one["test"] != "position" for row in _items(one)]
    if items:
        shares = ("Correct original", "Correct NBL", "Loss original", "Loss NBL", "Difference (nats)")
        columns = Column.numbers("Tokens", "Items", *shares)
        yield Table.of((Column("Test", "wrap"), *columns), items, "Retrieval and copying")


def _figures(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Figures of the original and of NBL; empty ones if a decoder was not measured."""
    return [row["figures"].get(variant, {}) for variant in ("original", "nbl")]


def _positions(one: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    places = words.positions([row["tokens"] for row in one["rows"]])
    name = one["task"].partition(":")[2]
    for place, row in zip(places, one["rows"], strict=True):
        losses = (figure.get("loss") for figure in _figures(row))
        shown = (words.number(math.exp(loss) if loss is not None and loss < 700 else None) for loss in losses)
        yield name, place, str(one["items"]), *shown, _difference(row, "increase")


def _items(one: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for row in one["rows"]:
        figures = _figures(row)
        correct = (f"{figure['correct']:.0%}" if figure else "–" for figure in figures)
        losses = (words.number(figure.get("loss")) for figure in figures)
        yield one["task"], f"{row['tokens']:,}", str(one["items"]), *correct, *losses, _difference(row, "loss")


def _difference(row: Mapping[str, Any], name: str) -> str:
    """A paired difference in words; a dash if one of the two was not measured."""
    found = next(iter(row["differences"]), None)
    if found is None:
        return "–"
    return describe_interval(found[name], found[f"{name}_interval"], percent=name == "increase", sign=True)
