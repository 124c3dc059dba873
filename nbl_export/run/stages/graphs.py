"""The stages that make graphs: the original and the NBL decoder, and compiled engines.

decoder ─► original/ ─► rewrite ─► model/, which can be deployed alone ─► (build) ─► engine/
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.files import versions, write_json
from nbl_export.graph.names import MANIFEST
from nbl_export.methods import cache_layers
from nbl_export.options.options import keeps_blocks
from nbl_export.options.public import public_facts
from nbl_export.records.inputs import Lazy
from nbl_export.run.job import Job
from nbl_export.run.stages.common import Skipped, StageContext
from nbl_export.run_directory import DECODERS, PACKAGES
from nbl_export.targets.base import BuildSettings, Engine, ExportSettings, compiler
from nbl_export.version import __version__

__all__ = ["declare_build", "declare_decoder", "declare_rewrite", "run_build", "run_decoder", "run_rewrite"]

_DEPLOYED_FACTS = ("schema", "model", "decoder", "options", "calibration", "num_layers", "replaced_layers", "kinds",
                   "tap", "select", "fit", "scores", "logits")  # fmt: skip

_BALANCE_TOKENS = 2048


# -- the original ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecoderInputs:
    """What the original graph follows from.

    Attributes:
        engine: exports the decoder. settings: without the directory of `codes`.
        kept_logits: "last" or "all".
        rows: of the calibration text, for a precision that rounds activations by channel, or None.
        codes: a checkpoint with quantised matrices of the same model, or None. tap: with which it must agree.
    """

    model: Lazy[Any]
    checkpoint: Lazy[Path]
    engine: Lazy[Engine]
    settings: ExportSettings
    kept_logits: str
    rows: Lazy[Any] | None
    codes: Lazy[Any]
    tap: str | None


def declare_decoder(job: Job) -> DecoderInputs:
    """The inputs of the stage."""
    options = job.options
    rounds = options.precision in job.engine.capabilities.balanced and not keeps_blocks(options.builder_options)
    return DecoderInputs(
        model=job.model,
        checkpoint=job.checkpoint,
        engine=Lazy([job.engine.capabilities.source, options.provider], lambda: job.engine),
        settings=ExportSettings(options.decoder_source, options.precision, job.cache_length, options.builder_options),
        kept_logits=options.kept_logits,
        rows=job.text.windows if rounds else None,
        codes=job.codes,
        tap=options.tap if options.quantized_model else None,
    )


def run_decoder(inputs: DecoderInputs, ctx: StageContext, out: Path) -> dict[str, Any]:
    """Write original/."""
    inputs.model.forget()  # the exporter loads its own copy
    engine = inputs.engine.value
    original = out / DECODERS["original"]
    settings = inputs.settings
    if inputs.tap is not None:
        from nbl_export.methods.checkpoint import quantized

        codes = inputs.codes.value
        quantized.check_same(codes, inputs.checkpoint.value, inputs.tap)
        settings = dataclasses.replace(settings, codes=Path(codes.directory))
    if inputs.rows is not None:
        rows_WT = inputs.rows.value
        count = max(1, _BALANCE_TOKENS // rows_WT.shape[1])
        settings = dataclasses.replace(settings, rows_BT=rows_WT[:count].numpy())
    engine.export(inputs.checkpoint.value, original, settings)
    if inputs.kept_logits == "last":
        engine.keep_last_token(original)
    return {"logits": inputs.kept_logits, "rounds_activations": inputs.rows is not None}


# -- the NBL decoder -------------------------------------------------------------------------------------------


def declare_rewrite(job: Job) -> Lazy[Engine]:
    """The engine, which replaces layers of the original graph by the plan and its maps."""
    return Lazy(job.engine.capabilities.static, lambda: job.engine)


def run_rewrite(inputs: Lazy[Engine], ctx: StageContext, out: Path) -> dict[str, Any]:
    """Write model/ with a manifest of its own."""
    plan = ctx.plan
    target = out / DECODERS["nbl"]
    original = ctx.run.path / DECODERS["original"]
    engine = inputs.value
    engine.linearize(original, target, ctx.maps(), plan.tap)
    facts = {k: ctx.run.manifest[k] for k in _DEPLOYED_FACTS}
    facts["exit"] = ctx.run.manifest.get("exit")
    if engine.capabilities.static:
        facts["cache_layers"] = list(cache_layers(plan))  # layers of the cache ids 0..K-1
    facts = public_facts(facts, ctx.run.manifest)  # the folder may be published: no paths of this machine
    write_json(target / MANIFEST, {**facts, "versions": versions(PACKAGES), "nbl_export": __version__})
    return {"versions": {"nbl-export": __version__, **versions(PACKAGES)}}


# -- compiled engines ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuildInputs:
    """What compiled engines follow from. library: its version."""

    available: Lazy[Engine]
    library: str
    settings: BuildSettings


def declare_build(job: Job) -> BuildInputs | Skipped:
    """The inputs of the stage; left out if the engine compiles nothing."""
    if not job.engine.capabilities.static:
        return Skipped()
    return BuildInputs(
        available=job.available,
        library=compiler(job.engine).library_version(),
        settings=BuildSettings(job.options.max_batch or 1, job.options.chunk(job.decoder)),
    )


def run_build(inputs: BuildInputs, ctx: StageContext, out: Path) -> dict[str, Any]:
    """Write engine/; returns the records of the engines for the manifest."""
    engine = compiler(inputs.available.value)
    engines = {}
    for subject, name in DECODERS.items():
        with ctx.ui.task(f"compiling {name}"):
            record = engine.build(ctx.run.path / name, out / "engine" / name, inputs.settings)
        ctx.ui.say(f"  {name}: {record['plan_bytes'] / 2**20:,.0f} MiB in {record['build_seconds']:.1f} s")
        engines[subject] = {k: v for k, v in record.items() if k not in ("inputs", "outputs", "schema")}
    return {"engines": engines, "status": ctx.verdict}
