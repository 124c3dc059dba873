"""acceptance.json as a page and as a table: a verdict for each step, then what each step saw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table as TerminalTable

from nbl_export.report import html, markdown, words
from nbl_export.report.blocks import (
    Alarm,
    Badge,
    Block,
    Cell,
    Column,
    Document,
    Items,
    Paragraph,
    Section,
    Table,
    Tone,
)

__all__ = ["document", "verdict_table", "write"]

_STATUS: Mapping[str, tuple[str, Tone]] = {
    "passed": ("Accepted", "ok"),
    "failed": ("Not accepted", "bad"),
    "cannot run": ("Cannot run here", "bad"),
    "incomplete": ("Not finished", "words"),
}
_COLUMNS: tuple[Column | str, ...] = ("Step", Column("What", "wrap"), "Verdict", Column("Time", "number"),
                                      Column("What was found", "detail"))  # fmt: skip


def write(found: Mapping[str, Any], page: Path, text: Path) -> None:
    """Write the HTML page and the Markdown text, each complete or not at all."""
    from nbl_export.files import replacing

    content = document(found)
    for path, written in ((page, html.document(content, {})), (text, markdown.document(content))):
        with replacing(path) as stream:
            stream.write(written.encode())


def document(found: Mapping[str, Any]) -> Document:
    """What the page says, of the value of acceptance.json."""
    verdict, tone = _STATUS[found["status"]]
    passed = sum(step["verdict"] == "passed" for step in found["steps"])
    head: tuple[Block, ...] = (
        Paragraph(f"{found['engine']}, {found['precision']} · {found['machine']['os']}", "meta"),
        Badge(verdict, f"{passed} of {len(found['steps'])} steps passed", tone),
        *_alarm(found),
    )
    steps = Section("Steps", (Table.of(_COLUMNS, map(_row, found["steps"])),))
    details = [_details(step) for step in found["steps"] if step["seen"] or step["messages"]]
    versions = tuple(f"{name} {version}" for name, version in found["versions"].items())
    return Document(f"Acceptance of {found['model']}", head, (steps, *details, Section("Versions", (Items(versions),))))


def _alarm(found: Mapping[str, Any]) -> tuple[Block, ...]:
    failed = [step for step in found["steps"] if step["verdict"] in ("failed", "cannot run")]
    if not failed:
        return ()
    said = "Do not use this engine on this machine before the first of these is settled."
    return (Alarm(said, tuple(f"{step['title']}: {_said(step)}" for step in failed)),)


def _said(step: Mapping[str, Any]) -> str:
    """The sentence of a verdict: what was found, the layer at fault, and what to do."""
    parts = [step["said"]]
    parts += [f"At fault: {step['layer']}"] if step["layer"] else []
    said = ". ".join(part.rstrip(".") for part in parts if part)
    return f"{said}. {step['advice']}" if step["advice"] else said


def _row(step: Mapping[str, Any]) -> tuple[Cell | str, ...]:
    verdict = Cell.verdict(step["verdict"], good="passed", bad="failed")
    return step["step"], step["title"], verdict, words.duration(step["seconds"]), _said(step)


def _details(step: Mapping[str, Any]) -> Section:
    blocks: list[Block] = []
    if step["seen"]:
        columns = (Column("Seen", "wrap"), Column("Value", "value"), Column("Limit", "number"))
        blocks.append(Table.of(columns, ((s["name"], _value(s["value"]), _limit(s["limit"])) for s in step["seen"])))
    if step["messages"]:
        blocks.append(Paragraph("Messages of the libraries:"))
        blocks.append(Items(tuple(step["messages"])))
    return Section(step["title"], tuple(blocks))


def _value(value: Any) -> str:
    if isinstance(value, float):
        return words.number(value)
    return words.listed(value)


def _limit(limit: float | None) -> str:
    return "–" if limit is None else words.number(limit)


def verdict_table(found: Mapping[str, Any]) -> TerminalTable:
    """The verdicts for people at a terminal."""
    from nbl_export.trust.terminal import visible

    table = TerminalTable("step", "verdict", "seconds", "what was found", title=f"Acceptance of {found['engine']}")
    for step in found["steps"]:
        seconds = "" if step["seconds"] is None else f"{step['seconds']:.1f}"
        table.add_row(step["title"], step["verdict"], seconds, visible(_said(step)))
    return table
