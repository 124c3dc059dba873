"""The quantize stage: a scale for each channel that matrices read, from the calibration text (`quantize.awq`)."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from nbl_export.run.job import Job
from nbl_export.run_directory import SCALES_FILE

__all__ = ["READ_TOKENS", "run"]

READ_TOKENS = 8192  # tokens whose magnitudes are averaged
_ROWS = 256  # rows on which the rounding is judged
_BLOCK = 32  # the GenAI builder's default


def run(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export.model.rescale import groups_of
    from nbl_export.quantize.awq import choose, observe, save_scales

    model, (windows, _) = job.model, job.windows
    ids = windows[: max(1, READ_TOKENS // windows.shape[1])]
    groups = list(groups_of(model))
    with job.ui.task("activations") as progress:
        seen = observe(model, groups, ids, _ROWS, progress)
    with job.ui.task("scales") as progress:
        found = choose(groups, seen, _block(job), progress)
    save_scales({name: choice.scale_C for name, choice in found.items()}, out / SCALES_FILE)
    errors = [choice.error for choice in found.values()]
    job.ui.say(f"  error of rounded products on its rows: {statistics.geometric_mean(errors):.2f} of plain rounding's")
    about = {name: {k: v for k, v in dataclasses.asdict(c).items() if k != "scale_C"} for name, c in found.items()}
    return {"quantize": {"method": "awq", "tokens": int(ids.numel()), "rows": _ROWS, "groups": about}}


def _block(job: Job) -> int:
    return next((int(w.split("=")[1]) for w in job.options.builder_option if w.startswith("block_size=")), _BLOCK)
