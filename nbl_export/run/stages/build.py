"""The build stage: the engine compiles both decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbl_export.run.facts import require_engine
from nbl_export.run.job import Job
from nbl_export.run.stages.common import VARIANTS, verdict

__all__ = ["run"]


def run(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export.targets.base import BuildSettings

    require_engine(job.options)
    settings = BuildSettings(job.options.max_batch or 1, job.options.chunk(job.spec))
    compiler = job.engine.compiler
    assert compiler is not None, "the stage is left out without"
    engines = {}
    for subject, name in VARIANTS.items():
        with job.ui.task(f"compiling {name}"):
            record = compiler.build(job.run.path / name, out / "engine" / name, settings)
        job.ui.say(f"  {name}: {record.plan_bytes / 2**20:,.0f} MiB in {record.build_seconds:.1f} s")
        engines[subject] = {k: v for k, v in record.to_json().items() if k not in ("inputs", "outputs", "schema")}
    return {"engines": engines, "status": verdict(job)}
