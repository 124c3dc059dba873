"""The report stage: writes all results of a run as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbl_export.records.from_json import edited
from nbl_export.run.job import Job
from nbl_export.run.stages.common import verdict
from nbl_export.run_directory import (
    BENCH_FILE,
    EVAL_FILE,
    LOSSLESS_FILE,
    SWEEP_FILE,
    VERIFY_FILE,
)

__all__ = ["run"]


def run(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export.report import page

    verify = job.run.read_json(VERIFY_FILE)
    benchmark = job.run.read_json(BENCH_FILE) if "bench" in job.run.stages else None
    sweep = job.run.read_json(SWEEP_FILE) if "sweep" in job.run.stages else None
    quality = job.run.read_json(EVAL_FILE) if "eval" in job.run.stages else None
    lossless = job.run.read_json(LOSSLESS_FILE) if "lossless" in job.run.stages else None
    with edited(
        job.run.path, "remove its verify.json, bench.json, sweep.json and eval.json, or start over with --force"
    ):
        page.render({**job.run.manifest, "status": verdict(job)}, verify, benchmark, out, sweep, quality, lossless)
    return {"status": verdict(job)}
