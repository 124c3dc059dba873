"""The decoder stage: the original decoder graph, exported or copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbl_export.run.job import Job
from nbl_export.run.quantize.rescaled import exported_checkpoint
from nbl_export.targets.onnx.export_genai import GGUF

__all__ = ["run"]


def run(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export.graph.given import copy_graph
    from nbl_export.rewrite import prune_directory
    from nbl_export.targets.export import build_decoder
    from nbl_export.targets.onnx.export_genai import BuilderSettings

    job.forget_model()  # the exporter loads its own copy
    options = job.options
    if job.graph is not None:
        copy_graph(job.graph, out / "original")
    else:
        settings = BuilderSettings(options.provider, options.builder_option, _codes(job), _gguf(job))
        with exported_checkpoint(job) as checkpoint:
            build_decoder(
                options.decoder_source, checkpoint, out / "original", options.precision,
                slots=job.slots, settings=settings,
            )  # fmt: skip
    if options.kept_logits == "last":
        prune_directory(out / "original")
    return {"logits": options.kept_logits}


def _gguf(job: Job) -> Path | None:
    """The model's GGUF file, if the graph gets its codes."""
    return job.source.gguf if job.options.precision == GGUF else None


def _codes(job: Job) -> Path | None:
    """The quantised checkpoint, after a check that it is of this model; None without one."""
    from nbl_export.model.checkpoint import quantized

    if job.quantized is None:
        return None
    quantized.check_same(job.quantized, job.checkpoint, job.options.tap)
    return Path(job.quantized.directory)
