"""The bench stage: both decoders measured side by side."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbl_export.files import write_json
from nbl_export.measure.benchmark import BenchSetting, side_by_side
from nbl_export.measure.cost import map_sizes
from nbl_export.measure.roofline import is_limited, limits_of
from nbl_export.measure.rounds import Variant
from nbl_export.plan.maps_file import load_maps
from nbl_export.run.facts import require_engine
from nbl_export.run.job import Job
from nbl_export.run.stages.common import VARIANTS, cost_of, verdict
from nbl_export.run_directory import BENCH_FILE, MAPS_FILE

__all__ = ["run"]


def run(job: Job, out: Path) -> dict[str, Any]:
    require_engine(job.options)
    options, spec, engine = job.options, job.spec, job.engine
    capabilities = engine.capabilities
    setting = BenchSetting(
        vocab_size=spec.vocab_size,
        context_length=job.slots,
        engine=options.engine,
        provider=options.provider,
        threads=engine.default_threads(),
        gpu=capabilities.static or options.provider != "cpu",
    )
    root = job.run.path / ("engine" if capabilities.static else "")
    token_bytes = functools.partial(spec.cache_bytes_per_token, itemsize=capabilities.cache_itemsize(options.precision))
    variants = {
        subject: Variant(root / name, engine.open_runner, token_bytes(kept))
        for (subject, name), kept in zip(VARIANTS.items(), (spec.num_layers, len(job.plan.kept)), strict=True)
    }
    with job.ui.task("rounds") as progress:
        result = side_by_side(variants, options, setting, progress, job.ui.say)
    said = {subject: engine.arithmetic(variant.directory) for subject, variant in variants.items()}
    arithmetic = {"arithmetic": said} if any(said.values()) else {}
    write_json(out / BENCH_FILE, {**result, **_limits(job, result), **arithmetic})
    return {"status": verdict(job)}


def _limits(job: Job, bench: Mapping[str, Any]) -> dict[str, Any]:
    if not is_limited(job.engine.capabilities, job.options.provider):
        return {}
    sizes = map_sizes(load_maps(job.run.path / MAPS_FILE, job.plan.replaced))
    return limits_of(bench, functools.partial(cost_of, job), sizes, job.options.precision)
