"""The stages bench and report: both decoders measured side by side, and all results of a run as a page."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.files import write_json
from nbl_export.measure.benchmark import BenchSetting, BenchTests, side_by_side
from nbl_export.measure.rounds import Variant
from nbl_export.methods import cache_layers
from nbl_export.records.capabilities import Capabilities
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.from_json import edited
from nbl_export.records.inputs import Lazy
from nbl_export.run.job import Job
from nbl_export.run.settled import faster_engine
from nbl_export.run.stages.common import Skipped, StageContext
from nbl_export.run_directory import BENCH_FILE, DECODERS
from nbl_export.targets.base import Engine, threads_of

__all__ = ["BenchInputs", "declare", "run"]


@dataclass(frozen=True)
class BenchInputs:
    """What is measured, beside the graphs; names as in the options."""

    available: Lazy[Engine]
    precision: str
    spec: DecoderSpec
    cache_length: int
    tests: BenchTests
    faster: Lazy[Engine | None]


def declare(job: Job) -> BenchInputs | Skipped:
    """The inputs of the stage; left out if the graphs do not run on this machine or in the timed runtime."""
    if job.engine.capabilities.needs_target_gpu:
        found = job.engine.probe(run=True)
        if not found.available:
            return Skipped(f"the graphs do not run on this machine: {found.reason}")
    options = job.options
    return BenchInputs(
        available=job.available,
        precision=options.precision,
        spec=job.decoder,
        cache_length=job.cache_length,
        tests=BenchTests(
            options.prompt_tokens, options.generate_tokens, options.depths, options.threads, options.repetitions
        ),
        faster=Lazy(None, lambda: faster_engine(job)),
    )


def run(inputs: BenchInputs, ctx: StageContext, out: Path) -> dict[str, Any]:
    """Write bench.json."""
    engine = inputs.available.value
    spec = inputs.spec
    capabilities = engine.capabilities
    setting = BenchSetting(
        vocab_size=spec.vocab_size,
        context_length=inputs.cache_length,
        engine=capabilities.name,
        provider=capabilities.provider,
        threads=inputs.tests.threads or threads_of(engine),
        gpu=capabilities.static or capabilities.provider != "cpu",
    )
    root = ctx.run.path / ("engine" if capabilities.static else "")
    token_bytes = functools.partial(spec.cache_bytes_per_token, itemsize=capabilities.cache_itemsize(inputs.precision))
    counts = spec.num_layers, len(cache_layers(ctx.plan))
    variants = {
        subject: Variant(root / name, engine.open_runner, token_bytes(kept))
        for (subject, name), kept in zip(DECODERS.items(), counts, strict=True)
    }
    with ctx.ui.task("rounds") as progress:
        result = side_by_side(variants, inputs.tests, setting, progress, ctx.ui.say)
    said = {subject: engine.arithmetic(variant.directory) for subject, variant in variants.items()}
    arithmetic = {"arithmetic": said} if any(said.values()) else {}
    slots = {"slots": inputs.cache_length} if capabilities.static else {}
    write_json(out / BENCH_FILE, {**result, **arithmetic, **slots, **_faster(inputs.faster.value, capabilities)})
    return {"status": ctx.verdict}


def _faster(other: Engine | None, measured: Capabilities) -> dict[str, Any]:
    """What the report says of an engine that reads prompts faster, and what this machine lacks for it."""
    if other is None:
        return {}
    found = other.probe()
    about = other.capabilities
    lacks = "" if found.available else found.reason
    titles = {"engine": about.name, "title": about.title, "precision": about.precisions[0], "than": measured.title}
    return {"faster": {**titles, "lacks": lacks}}


# -- report ----------------------------------------------------------------------------------------------------


def run_report(_inputs: tuple[()], ctx: StageContext, out: Path) -> dict[str, Any]:
    """Write the report as HTML, Markdown and JSON. It follows from what earlier stages left, and nothing else."""
    from nbl_export.report import page

    verify, bench, quality = page.results_of(ctx.run)
    with edited(ctx.run.path, page.ADVICE):
        page.render({**ctx.run.manifest, "status": ctx.verdict}, verify, bench, out, quality)
    return {"status": ctx.verdict}
