"""Exports of checkpoints by the target that takes a decoder source."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nbl_export.options.options import JobOptions
from nbl_export.targets import exporter_of
from nbl_export.targets.base import ExportSettings

__all__ = ["build_decoder"]


def build_decoder(source: str, checkpoint: Path, out: Path, precision: str, *, cache_length: int = 0) -> None:
    """Export a checkpoint directory with the named source, as a job does."""
    usual = JobOptions("m", decoder_source=source, precision=precision).builder_options
    rows_BT = np.random.default_rng(0).integers(0, 64, (4, 64))
    exporter_of(source).export(checkpoint, out, ExportSettings(source, precision, cache_length, usual, rows_BT=rows_BT))
