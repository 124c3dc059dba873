"""The stages of a job: inputs, options and skip condition of each."""

from __future__ import annotations

from typing import Any

from nbl_export.graph.names import GENAI_CONFIG
from nbl_export.options.goals import GOALS, goal_inputs
from nbl_export.options.options import GIVEN, GIVEN_FIT, NO_ORIGINAL
from nbl_export.run.job import Job
from nbl_export.run.quantize.stage import READ_TOKENS
from nbl_export.run.stages.common import Stage
from nbl_export.text.held_back import DIVISION

__all__ = ["STAGES", "readers"]


def _no_calibrate(job: Job) -> str | None:
    return NO_ORIGINAL if job.options.fit == GIVEN_FIT else None


def _no_sweep(job: Job) -> str | None:
    return _no_calibrate(job) if job.sweep is not None else ""


def _no_distill(job: Job) -> str | None:
    return None if job.options.fit == "distilled" and job.plan.replaced else ""


def _no_quantize(job: Job) -> str | None:
    return None if job.options.quantize == "awq" else ""


def _no_eval(job: Job) -> str | None:
    """Skip unless evaluation was requested, because it can take hours on a small machine."""
    return "" if job.evaluation is None else None


def _no_build(job: Job) -> str | None:
    return None if job.engine.compiler else ""


def _no_bench(job: Job) -> str | None:
    """Skip if the graphs do not run on this machine or in the timed runtime."""
    if job.options.decoder_source == GIVEN and not (job.run.path / "original" / GENAI_CONFIG).is_file():
        return "ONNX Runtime GenAI cannot time the model, which has no genai_config.json"
    if not job.engine.capabilities.cross:
        return None
    found = job.engine.probe_run()
    return None if found.available else f"the graphs do not run on this machine: {found.reason}"


def _no_lossless(job: Job) -> str | None:
    return "" if job.options.draft is None else None


def _parts(job: Job) -> list[Any]:
    return [*_texts(job), DIVISION]


def _kind(job: Job) -> list[str]:
    """The kind of the maps, unless it is the default one: runs that were made before there was another stay valid."""
    return [] if job.options.has_bias else [job.options.maps]


def _texts(job: Job) -> list[Any]:
    return [job.fingerprint, job.text_sha256]


def _awq_texts(job: Job) -> list[Any]:
    """The texts, and the calibration tokens if they are fewer than the stage reads."""
    tokens = job.options.calibration_tokens
    return [*_texts(job), *([tokens] if tokens < READ_TOKENS else [])]


def _sweep_inputs(job: Job) -> list[Any]:
    from nbl_export.run.stages.sweep import sweep_inputs

    return sweep_inputs(job)


STAGES = (
    Stage(
        "calibrate", "calibrate", (), ("calibration_tokens", "context", "tap", "compute_dtype"), _texts, _no_calibrate
    ),
    Stage(
        "plan", "plan", ("calibrate",), (*GOALS, "select", "rank", "tap", "fit", "compute_dtype"),
        lambda job: [job.request, goal_inputs(job.options), DIVISION, *_kind(job)],
    ),
    Stage("sweep", "sweep", ("calibrate",), ("select", "rank", "tap", "compute_dtype"), _sweep_inputs, _no_sweep),
    Stage(
        "distill", "distill", ("plan",),
        ("distill_steps", "distill_minutes", "distill_tokens", "lora_rank", "label_weight",
         "seed", "calibration_tokens", "context"),
        _parts, _no_distill,
    ),
    Stage(
        "quantize", "activation-aware scales", (), ("quantize", "context", "builder_option"), _awq_texts,
        _no_quantize,
        ".quantize.stage",
    ),
    Stage(
        "decoder", "decoder graph", ("quantize",),
        ("precision", "decoder_source", "provider", "builder_option", "max_seq_len"),
        lambda job: [job.fingerprint, job.options.kept_logits, *job.codes],
    ),
    Stage("rewrite", "rewrite", ("plan", "distill", "decoder"), ("token_table",)),
    Stage("verify", "verify", ("rewrite",), ("calibration_tokens", "context"), _parts),
    Stage(
        "eval", "evaluate", ("rewrite",), (), lambda job: [job.evaluation and job.evaluation.identity], _no_eval,
        "evaluate",
    ),
    Stage(
        "build", "build", ("rewrite",), ("engine", "max_batch", "prefill_chunk"),
        lambda job: [job.engine.compiler and job.engine.compiler.library_version()], _no_build,
    ),
    Stage(
        "bench", "bench", ("rewrite", "build"),
        ("depths", "repetitions", "prompt_tokens", "generate_tokens", "threads", "batches"),
        skip=_no_bench,
    ),
    Stage(
        "lossless", "lossless decoding", ("decoder", "rewrite"), ("draft", "draft_layers", "threads", "requantize"),
        skip=_no_lossless, module=".lossless.stage",
    ),
    Stage("report", "report", ("plan", "sweep", "verify", "eval", "build", "bench", "lossless"), ()),
)  # fmt: skip


def readers(name: str) -> list[str]:
    """Names of the stages that read a stage, directly or indirectly."""
    found = [name]
    for stage in STAGES:  # STAGES is in order, so one pass finds all
        if set(stage.reads) & set(found):
            found.append(stage.name)
    return found[1:]
