"""The rungs of verification, and what they prove."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbl_export.report import words
from nbl_export.report.blocks import (
    Cell,
    Column,
    Items,
    Paragraph,
    Section,
    Table,
)

__all__ = ["section"]

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


def _row(rung: Mapping[str, Any]) -> tuple[Cell | str, ...]:
    tolerance = rung["tolerance"]
    verdict = "failed" if not rung["passed"] else "not gated" if tolerance is None else "passed"
    allowed = "–" if tolerance is None else f"{tolerance:g}"
    said = Cell.verdict(verdict, good="passed", bad="failed")
    seen = words.number(rung["value"], "not finite")
    return rung["rung"], rung["subject"], rung["metric"], seen, allowed, said, rung.get("detail") or ""
