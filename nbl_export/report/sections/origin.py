"""How the model was made: command, stages, text, machine, settings and versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nbl_export.report import words
from nbl_export.report.blocks import (
    Block,
    Code,
    Column,
    Heading,
    Pair,
    Section,
    Table,
)

__all__ = ["section"]


def section(report: Mapping[str, Any]) -> Section:
    """What another needs to make the same model."""
    settings = ((name.replace("_", " "), value) for name, value in (report["options"] or {}).items())
    versions = [*_facts("Settings", settings), *_facts("Versions", (report["versions"] or {}).items())]
    if report["bench"] and report["bench"]["versions"]:
        versions += _facts("Versions at the benchmark", report["bench"]["versions"].items())
    left = (*_stages(report), *_text(report), *_machine(report["machine"]))
    return Section("How it was made", (Heading("Command"), Code(report["command"]), Pair(left, tuple(versions))))


def _stages(report: Mapping[str, Any]) -> tuple[Block, ...]:
    rows = [(name, words.duration(seconds)) for name, seconds in report["stage_seconds"].items()]
    return Heading("Stages"), Table.of(("Stage", Column("Time", "number")), rows)


def _text(report: Mapping[str, Any]) -> tuple[Block, ...]:
    text = report["calibration"]
    parts = ((f"sha256 of {part['name']}", part["sha256"]) for part in text.get("parts", ()))
    facts = (("name", text["name"]), ("sha256", text["sha256"]), *parts, ("tokens", f"{text['tokens']:,}"),
             ("context", text["context"]))  # fmt: skip
    return _facts("Text" if report["without_original"] else "Calibration text", facts)


def _machine(machine: Mapping[str, Any] | None) -> tuple[Block, ...]:
    if not machine:
        return ()
    facts = (("processor", machine.get("cpu")), ("cores", machine.get("cores")),
             ("memory", words.size(machine.get("memory_bytes"))), ("system", machine.get("os")),
             ("Python", machine.get("python")))  # fmt: skip
    return _facts("Machine", facts)


def _facts(title: str, facts: Iterable[tuple[str, Any]]) -> tuple[Block, ...]:
    """Names and values; None is a dash."""
    rows = ((name, "–" if value is None else words.listed(value)) for name, value in facts)
    return Heading(title), Table.of(("What", Column("Value", "value")), rows)
