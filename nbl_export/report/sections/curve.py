"""Quality and modelled speed of smaller and larger sets of layers, as the choice of layers saw them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nbl_export.measure.rows import spoken_ratio
from nbl_export.options.goals import default_select
from nbl_export.options.options import JobOptions, describe_command
from nbl_export.options.settle import over
from nbl_export.report import words
from nbl_export.report.blocks import (
    Code,
    Column,
    Heading,
    Paragraph,
    Section,
    Table,
)

__all__ = ["sections", "spoken_curve"]


def sections(report: Mapping[str, Any]) -> tuple[Section, ...]:
    """One section, or none: a sweep says more, and layers that the user named have no curve."""
    curve = report.get("curve")
    if not curve or report["sweep"]:
        return ()
    columns: tuple[Column | str, ...] = (
        *Column.numbers("Layers", *(f"Increase, {name}" for name in curve["texts"]), "Prefill", "Decode"),
        Column("Which", "wrap"),
    )
    table = Table.of(columns, [_row(point) for point in curve["points"]])
    return (
        Section(
            "More or fewer layers",
            (Paragraph(" ".join(_note(report, curve))), table, Heading("Commands"), *map(Code, _commands(report))),
        ),
    )


def spoken_curve(curve: Mapping[str, Any]) -> str:
    """The curve in a line: "4 layers: +15%, x1.12 prefill; 8: +29%, x1.24"."""
    said = []
    for k, point in enumerate(curve["points"]):
        unit = "" if k else f" layer{'s' * (point['layers'] > 1)}"
        prefill = f"×{spoken_ratio(point['prefill'])}{'' if k else ' prefill'}"
        said.append(f"{point['layers']}{unit}: {_rise(max(point['increases']))}, {prefill}")
    return "; ".join(said)


def _rise(share: float) -> str:
    return f"{'+' if share >= 0 else '−'}{words.percent(abs(share))}"


def _row(point: Mapping[str, Any]) -> tuple[str, ...]:
    speeds = (f"×{spoken_ratio(point[name])}" for name in ("prefill", "decode"))
    rises = (_rise(share) for share in point["increases"])
    return str(point["layers"]), *rises, *speeds, words.listed(point["replaced_layers"])


def _note(report: Mapping[str, Any], curve: Mapping[str, Any]) -> Iterator[str]:
    yield "The choice of layers measured each of these sets, before any training of the maps."
    yield "Increases of perplexity are of the text that chose the layers, so they are somewhat too low."
    yield "The commands run in the directory of this report."
    of = f" for {curve['engine']} in {curve['precision']}" if "engine" in curve else ""
    yield f"Speed is modelled{of}: a prefill of {curve['tokens']} tokens, then one decode step."
    goal = report.get("goal") or {}
    if goal.get("default"):
        count, limit = len(report["replaced_layers"]), goal["max_perplexity_increase"]
        yield f"Neither a count nor a goal was given, so the increase was limited to {limit} on every text."
        yield f"This run took the most layers that are shown to keep the limit: {count} {words.plural('layer', count)}."
    if report["fit"] == "independent":
        yield "Training the maps (--fit distilled) can lower the loss at no cost in speed. How much is unknown before."


def _commands(report: Mapping[str, Any]) -> Iterator[str]:
    """Commands for the next counts of the curve, run in the run directory, and for distillation in a new one."""
    taken, curve = len(report["replaced_layers"]), report["curve"]
    options = JobOptions.from_json(over(report["options"], {"layers": str(taken)}))
    if options.select is None and default_select(options) != report["select"]:
        options = dataclasses.replace(options, select=report["select"])  # the order of this curve
    select = "" if options.select is None else f" --select {options.select}"
    for point in [p for p in curve["points"] if p["layers"] > taken][:2]:
        yield f"nbl-export plan . --layers {point['layers']}{select} && nbl-export report ."
    if report["fit"] == "independent" and taken:
        yield describe_command(
            dataclasses.replace(options, fit="distilled", tap="normed", rank=None), Path("distilled")
        )
