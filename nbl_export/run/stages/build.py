"""The build stage: the engine compiles both decoders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.records.inputs import Lazy
from nbl_export.run.resolve import Resolver
from nbl_export.run.stages.common import LeftOut, Place
from nbl_export.run_directory import DECODERS
from nbl_export.targets.base import BuildSettings, Target

__all__ = ["BuildInputs", "declare", "run"]


@dataclass(frozen=True)
class BuildInputs:
    """What compiled engines follow from. library: its version."""

    available: Lazy[Target]
    library: str
    max_batch: int
    prefill_chunk: int


def declare(r: Resolver) -> BuildInputs | LeftOut:
    """The inputs of the stage; left out if the engine compiles nothing."""
    if not r.engine.capabilities.static:
        return LeftOut()
    chunk, batch = r.options.chunk(r.spec), r.options.max_batch or 1
    return r.fill(BuildInputs, library=r.engine.library_version(), max_batch=batch, prefill_chunk=chunk)


def run(inputs: BuildInputs, place: Place, out: Path) -> dict[str, Any]:
    """Write engine/; returns the records of the engines for the manifest."""
    engine = inputs.available.value
    settings, engines = BuildSettings(inputs.max_batch, inputs.prefill_chunk), {}
    for subject, name in DECODERS.items():
        with place.ui.task(f"compiling {name}"):
            record = engine.build(place.run.path / name, out / "engine" / name, settings)
        place.ui.say(f"  {name}: {record['plan_bytes'] / 2**20:,.0f} MiB in {record['build_seconds']:.1f} s")
        engines[subject] = {k: v for k, v in record.items() if k not in ("inputs", "outputs", "schema")}
    return {"engines": engines, "status": place.verdict}
