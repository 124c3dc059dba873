"""Sources of decoder graphs, one file or package a source; each exports a checkpoint.

genai and mobius write a GenAI model directory (model.onnx). static writes a decoder.onnx for a compiler. openvino
writes an IR directory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nbl_export.targets.export import mobius
from nbl_export.targets.export.bounds import check_bounds
from nbl_export.targets.export.finish import finish_directory
from nbl_export.targets.onnx import export_genai as genai

__all__ = ["PRECISIONS", "SOURCES", "build_decoder"]

SOURCES: dict[str, Callable[[Path, Path, str], None]] = {"genai": genai.build, "mobius": mobius.build}
PRECISIONS = {
    "genai": genai.PRECISIONS,
    "mobius": mobius.PRECISIONS,
    "openvino": ("fp16", "fp32", "int8", "int4"),  # as `decoders.openvino` says, which needs torch
    "static": ("fp32", "fp16", "bf16", "int4"),  # repeated: that module needs onnx_ir, which a build machine lacks
}


def build_decoder(
    source: str,
    checkpoint: Path,
    out: Path,
    precision: str,
    *,
    slots: int = 0,
    settings: genai.BuilderSettings | None = None,
) -> None:
    """Export a checkpoint directory to a deployable directory with the named source.

    Args:
        slots: of a cache; for the static source alone.
        settings: for the GenAI source alone.

    Raises:
        NblError: the source refuses the checkpoint or the precision, or the checkpoint lacks a weight; the message has
            the reason.
    """
    check_bounds(checkpoint)
    if source == "static":
        from nbl_export.targets.tensorrt import export as static

        static.build(checkpoint, out, precision, max_seq_len=slots)
        return
    if source == "openvino":
        from nbl_export.targets.openvino import export as openvino

        openvino.build(checkpoint, out, precision)
        return
    if source == "genai":
        genai.build(checkpoint, out, precision, settings)
    else:
        SOURCES[source](checkpoint, out, precision)
    finish_directory(checkpoint, out)
