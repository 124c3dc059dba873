"""What a job will take, in words and tables: the value of `run.estimate.estimate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbl_export.report.table import Column, Shown, Table, facts
from nbl_export.report.words import number, size

__all__ = ["TITLES", "estimate_table", "spoken_time", "spoken_totals"]

TITLES = {"decoder": "decoder graph"}  # of stages whose title is not their name


def spoken_time(seconds: float) -> str:
    """An estimated time: "45 s", "12 minutes", "3.2 hours"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def spoken_totals(found: Mapping[str, Any]) -> str:
    """Time, memory and disk of a job in words."""
    return (
        f"about {spoken_time(found['seconds'])}, {size(found['peak_bytes'])} of memory and "
        f"{size(found['disk_bytes'])} of disk"
    )


def estimate_table(found: Mapping[str, Any]) -> Shown:
    """Model and machine, a row for each stage, a row for each number of layers, and the reason of a refusal."""
    decoder, options, machine = found["decoder"], found["options"], found["machine"]
    bfloat16 = ", twice as many in bfloat16" if machine["bfloat16"] else ""
    head = facts([
        ("model", found["model"]),
        ("decoder", f"{decoder['architecture']}, {decoder['num_layers']} layers, hidden size {decoder['hidden_size']}, "
                    f"{number(found['parameters'] / 1e6)} million parameters"),
        ("job", f"--engine {options['engine']} --precision {options['precision']} --fit {options['fit']}, about "
                f"{found['replaced']} layers replaced, {options['calibration_tokens']:,} tokens of calibration"),
        ("this machine", f"{number(machine['product_flops_per_second'] / 1e9)} billion operations a second in float32"
                         f"{bfloat16}; {size(machine['memory_bytes'])} of memory available, "
                         f"{size(machine['disk_bytes'])} of disk left here"),
    ])  # fmt: skip
    refused = (f"The job would be refused: {found['refused']}.",) if found["refused"] else ()
    return head, _stages(found), _gains(found), f"The job takes {spoken_totals(found)}.", *refused


def _stages(found: Mapping[str, Any]) -> Table:
    columns = ("stage", *Column.numbers("time", "peak memory", "needed memory", "disk"))
    rows = [
        (TITLES.get(stage["stage"], stage["stage"]), spoken_time(stage["seconds"]), size(stage["peak_bytes"]),
         size(stage["needed_bytes"]), size(stage["disk_bytes"]) if stage["disk_bytes"] else "")
        for stage in found["stages"]
    ]  # fmt: skip
    needed = max(stage["needed_bytes"] for stage in found["stages"])
    total = ("whole job", spoken_time(found["seconds"]), size(found["peak_bytes"]), size(needed),
             size(found["disk_bytes"]))  # fmt: skip
    return Table.of(columns, [*rows, total], "Stages, estimated", totals=1)


def _gains(found: Mapping[str, Any]) -> Table:
    columns = ("replaced layers", *Column.numbers(
        f"prefill {found['tokens']}", "if they are the last", "decode", "cache of a token",
    ))  # fmt: skip
    rows = (
        (gain["layers"], f"{gain['prefill']:.2f}×", f"{gain['prefill_last']:.2f}×", f"{gain['decode']:.2f}×",
         size(gain["cache_bytes_per_token"]))
        for gain in found["gains"]
    )  # fmt: skip
    return Table.of(columns, rows, "Gain, modelled")
