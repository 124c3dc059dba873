"""The model that graphs are made from: the job's model, or the same function with activation-aware scales.

Calibration, plan and distillation use the model as it is. From the decoder graph on, matrices are the rescaled ones,
and maps behind a norm read the rescaled norm's output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.mixers.base import Mixer
from nbl_export.records.results import RungResult
from nbl_export.run.job import Job
from nbl_export.run_directory import SCALES_FILE

__all__ = ["check_rescaled", "exported_checkpoint", "exported_maps", "exported_model"]

METRIC = "rescaled model: max abs logit difference"


def _scales(job: Job) -> dict[str, Any]:
    from nbl_export.quantize.awq import load_scales

    return load_scales(job.run.path / SCALES_FILE) if job.options.quantize == "awq" else {}


def exported_model(job: Job) -> Any:
    """The torch model with the matrices that graphs are made from. The job keeps it until it forgets its model."""
    from nbl_export.model.rescale import rescale

    scales = _scales(job)
    if not scales:
        return job.model
    job.forget_model()
    rescale(job.model, scales)
    return job.model


@contextlib.contextmanager
def exported_checkpoint(job: Job) -> Iterator[Path]:
    """A directory with the checkpoint that graphs are made from."""
    from nbl_export.targets.export.finish import add_text_files

    if job.options.quantize != "awq":
        yield job.checkpoint
        return
    with job.run.scratch() as scratch:
        directory = scratch / "checkpoint"
        exported_model(job).save_pretrained(directory)
        job.forget_model()
        add_text_files(job.checkpoint, directory)
        yield directory


def exported_maps(job: Job, maps: Mapping[int, Mixer]) -> dict[int, Mixer]:
    """The maps of the exported model: behind a norm, columns are multiplied by the norm's scale."""
    if job.plan.tap != "normed":
        return dict(maps)
    scales = _scales(job)
    named = {i: scales.get(f"layers.{i}.qkv") for i in maps}
    return {i: m if (scale := named[i]) is None else m.scaled_input(scale.numpy()) for i, m in maps.items()}


def check_rescaled(job: Job, row: tuple[int, ...]) -> list[RungResult]:
    """Rung a: the rescaled model gives the original's logits, within the float32 tolerance.

    Args:
        row: held-back token ids.
    """
    from nbl_export.verify.ladder import TOLERANCES
    from nbl_export.verify.torch_reference import row_logits

    if job.options.quantize != "awq":
        return []
    job.forget_model()
    before = row_logits(job.model, row)
    away = float(np.abs(row_logits(exported_model(job), row) - before).max())
    job.forget_model()
    allowed = TOLERANCES["fp32"].limit
    return [RungResult("a", "original", METRIC, away, allowed, away <= allowed, f"{len(row)} tokens")]
