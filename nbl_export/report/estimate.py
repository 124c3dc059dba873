"""What a job will take, in words and a table: the value of `run.estimate.estimate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nbl_export.report.table import Column, Shown, Table, facts
from nbl_export.report.words import number, plural, size

__all__ = ["describe_totals", "estimate_table"]


_LEAST, _MOST = 3 / 4, 4 / 3  # times the estimated seconds: most jobs that were measured lie between
_BUSY = 1.2  # times the seconds of a machine that does nothing else: other programs are told from here on


def _describe_range(seconds: float) -> str:
    """The range of an estimated time: "34 to 60 s", "9 to 16 minutes"."""
    low, high = _describe_time(_LEAST * seconds), _describe_time(_MOST * seconds)
    (least, unit), (most, same) = low.split(), high.split()
    return low if low == high else f"{least} to {most} {unit}" if unit == same else f"{low} to {high}"


def _describe_time(seconds: float) -> str:
    """An estimated time: "45 s", "12 minutes", "3.2 hours"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def describe_totals(job: Mapping[str, Any]) -> str:
    """Time, memory and disk of a job in words."""
    time, memory, disk = _figures(job)
    if job["busy_seconds"] > _BUSY * job["seconds"]:
        time += f" if nothing else runs ({_describe_range(job['busy_seconds'])} beside what runs now)"
    return f"{time}, at least {memory} of memory and {disk} of disk"


def _figures(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return _describe_range(row["seconds"]), size(row["memory_bytes"] or None), size(row["disk_bytes"] or None)


def _first_tokens(gains: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for gain in gains:
        count = gain["layers"]
        kind = gain["kind"] if gain["is_asked"] else f"{gain['kind']} (--exit-layer auto)"
        who = f"{count} {plural('layer', count)} with {kind}"
        rows.append((who, f"{gain['tokens']:,}", f"{gain['speedup']:.2f}×"))
    return Table.of(("replaced", *Column.numbers("prompt", "faster")), rows, "First token of a prompt, by counted work")


def estimate_table(job: Mapping[str, Any]) -> Shown:
    """Model and machine, a row for each stage, and the reason of a refusal."""
    decoder = job["decoder"]
    options = job["options"]
    machine = job["machine"]
    tiles = ", twice as many in bfloat16" if machine["tiles"] else ""
    head = facts(
        [
            ("model", job["model"]),
            (
                "decoder",
                f"{decoder['architecture']}, {decoder['num_layers']} layers, hidden size {decoder['hidden_size']}, "
                f"{number(job['parameters'] / 1e6)} million parameters",
            ),
            (
                "job",
                f"--engine {options['engine']} --precision {options['precision']} --fit {options['fit']}, about "
                f"{job['replaced']} layers replaced, {options['calibration_tokens']:,} tokens of calibration",
            ),
            *(sentence.split(": ", 1) for sentence in job["expected"]),
            (
                "this machine",
                f"{number(machine['product_flops_per_second'] / 1e9)} billion operations a second in float32"
                f"{tiles}, {machine['share']:.0%} of its time free; "
                f"{size(machine['memory_bytes'])} of memory available, "
                f"{size(machine['disk_bytes'])} of disk left here",
            ),
        ]
    )
    rows = [(row["stage"], *_figures(row)) for row in (*job["stages"], {"stage": "whole job", **job})]
    columns = ("stage", *Column.numbers("time", "memory", "disk"))
    refused = (f"The job would be refused: {job['refused']}.",) if job["refused"] else ()
    stages = Table.of(columns, rows, "Stages, estimated", totals=1)
    return head, _first_tokens(job["gains"]), stages, f"The job takes {describe_totals(job)}.", *refused
