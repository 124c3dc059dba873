"""The tables of jobs on large shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Rows = list[Sequence[str]]
Read = Callable[[str], Any]
_SHAPES = {"3B": "shapes-3b", "8B": "shapes-8b", "8B, mapped": "shapes-8b-mapped"}


def shapes(read: Read) -> Rows:
    """Seconds and peak memory of the stages of jobs on random checkpoints of large shapes."""
    runs = {title: read(name)["shapes"][title.split(",")[0]] for title, name in _SHAPES.items()}
    rows: Rows = [("stage", *(cell for shape in runs for cell in (shape, "peak"))), "l" + "rr" * len(runs)]
    for stage in ("calibrate", "plan", "decoder", "rewrite", "verify", "bench"):
        took = [run.get(stage) for run in runs.values()]
        cells = [(f"{t['seconds']:.0f} s", f"{t['peak_bytes'] / 1e9:.1f} GB") if t else ("not run", "") for t in took]
        if stage == "verify":
            stopped = read("shapes-8b-verify")
            minutes, peak = stopped["seconds_before_the_loss"] / 60, stopped["peak_bytes"] / 1e9
            cells[list(runs).index("8B")] = (f"{minutes:.0f} min to the loss on text", f"{peak:.1f} GB")
        rows.append((stage, *(text for cell in cells for text in cell)))
    return rows


def limited(read: Read) -> Rows:
    """Peak memory without mapped files, of stages that had a limit of 16 GiB."""
    shape = read("shapes-8b-16gib")["shapes"]["8B"]
    stages = {stage: shape[stage]["peak_anonymous_bytes"] for stage in ("calibrate", "plan", "decoder", "rewrite")}
    stages |= {f"verify, {part}": found["peak_anonymous_bytes"] for part, found in shape["verify"].items()}
    return [("stage", "peak without mapped files"), "lr", *((name, f"{n / 1e9:.1f} GB") for name, n in stages.items())]
