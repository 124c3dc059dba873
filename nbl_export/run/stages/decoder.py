"""The decoder stage: the original decoder graph, exported or copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbl_export.options.options import GGUF
from nbl_export.run.job import Job
from nbl_export.run.quantize.rescaled import exported_checkpoint
from nbl_export.targets.base import ExportSettings

__all__ = ["run"]


def run(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export.graph.given import copy_graph

    job.forget_model()  # the exporter loads its own copy
    options = job.options
    if job.graph is not None:
        copy_graph(job.graph, out / "original")
    else:
        settings = ExportSettings(
            options.decoder_source, options.precision, job.slots, options.builder_option, _codes(job), _gguf(job)
        )
        with exported_checkpoint(job) as checkpoint:
            job.engine.export(checkpoint, out / "original", settings)
    if options.kept_logits == "last":
        job.engine.keep_last_token(out / "original")
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
