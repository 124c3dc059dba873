"""The rungs of verification and what they prove, and the page of `accept`, which has the same rungs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbl_export.report import words
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

__all__ = ["acceptance", "section"]

_COLUMNS: tuple[Column | str, ...] = (
    "Rung",
    "Subject",
    Column("Metric", "wrap"),
    *Column.numbers("Value", "Tolerance"),
    "Verdict",
    Column("Detail", "detail"),
)


def section(report: Mapping[str, Any]) -> Section:
    """Every rung with its verdict."""
    proof = (Items(tuple(report["proof"])),) if report["proof"] else ()
    note = f"Each rung compares one figure with a tolerance that was fixed beforehand for {report['precision']}."
    return Section("Verification", (*proof, Paragraph(note), Table.of(_COLUMNS, map(_row, report["rungs"]))))


_STATUS: Mapping[str, tuple[str, Tone]] = {
    "passed": ("Accepted", "ok"),
    "failed": ("Not accepted", "bad"),
    "cannot run": ("Cannot run here", "bad"),
    "incomplete": ("Not finished", "words"),
}


def acceptance(found: Mapping[str, Any]) -> Document:
    """What acceptance.md says, of the value of acceptance.json."""
    verdict, tone = _STATUS[found["status"]]
    passed = sum(rung["passed"] for rung in found["rungs"])
    said = "{subject}, rung {rung}: {metric}: {detail}"
    failed = [said.format(**rung) for rung in found["rungs"] if not rung["passed"]]
    failed += [found["cannot_run"]] if found["cannot_run"] else []
    warning = "Do not use this engine on this machine before the first of these is settled."
    head: tuple[Block, ...] = (
        Paragraph(f"{found['engine']}, {found['precision']} · {found['machine']['os']}", "meta"),
        Badge(verdict, f"{passed} of {len(found['rungs'])} checks passed", tone),
        *([Alarm(warning, tuple(failed))] if failed else []),
    )
    told = (("Messages of the libraries", found["messages"]),
            ("Versions", [f"{name} {version}" for name, version in found["versions"].items()]))  # fmt: skip
    lists = (Section(title, (Items(tuple(texts)),)) for title, texts in told if texts)
    checks = section({"proof": [], "precision": found["precision"], "rungs": found["rungs"]})
    return Document(f"Acceptance of {found['model']}", head, (checks, *lists))


def _row(rung: Mapping[str, Any]) -> tuple[Cell | str, ...]:
    tolerance = rung["tolerance"]
    verdict = "failed" if not rung["passed"] else "not gated" if tolerance is None else "passed"
    allowed = "–" if tolerance is None else f"{tolerance:g}"
    said = Cell.verdict(verdict, good="passed", bad="failed")
    seen = words.number(rung["value"], "not finite")
    return rung["rung"], rung["subject"], rung["metric"], seen, allowed, said, rung.get("detail") or ""
