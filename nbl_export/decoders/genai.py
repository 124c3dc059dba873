"""The ONNX Runtime GenAI model builder: GroupQueryAttention with rotary inside, packed QKV, skip norms.

The fastest graph on ONNX Runtime. Its int8 and int4 are weight-only (MatMulNBits, block 32, symmetric,
accuracy level 4 on the CPU).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from nbl_export.decoders.quiet import captured
from nbl_export.errors import MissingPackageError, NblError

__all__ = ["build"]

_PRECISIONS = ("fp32", "int8", "int4")


def build(checkpoint: Path, out: Path, precision: str) -> None:
    """Write model.onnx, its data, genai_config.json and the tokenizer to `out`."""
    if precision not in _PRECISIONS:
        raise NblError(
            f"the GenAI builder makes no {precision} graph for the CPU; use --precision {', '.join(_PRECISIONS)}, "
            "or --decoder-source mobius for fp16"
        )
    try:
        from onnxruntime_genai.models.builder import create_model, parse_extra_options
    except ImportError as error:
        raise MissingPackageError("onnxruntime_genai", "cpu", "building the decoder graph") from error
    with tempfile.TemporaryDirectory() as cache, captured("the GenAI builder", checkpoint):
        where = ("", str(checkpoint), str(out), precision, "cpu", cache)
        create_model(*where, **parse_extra_options(*where, []))
