"""The ONNX Runtime GenAI model builder: GroupQueryAttention with rotary inside, packed QKV, skip norms.

The fastest graph on ONNX Runtime. Its int8 and int4 are weight-only (MatMulNBits, block 32, symmetric,
accuracy level 4 on the CPU).
"""

from __future__ import annotations

import json
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
    _restore_window(checkpoint, out / "model.onnx")


def _restore_window(checkpoint: Path, path: Path) -> None:
    """Give Mistral's attention its sliding window, which the builder (0.18) leaves out: local_window_size -1.

    The same number of keys as in transformers: a query sees itself and the window - 1 keys before it. Without
    this the graph agrees with torch only up to the window's length.
    """
    import onnx

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    window = config.get("sliding_window")
    if config["model_type"] != "mistral" or not window:
        return
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            for attribute in node.attribute:
                if attribute.name == "local_window_size" and attribute.i < 0:
                    attribute.i = int(window)
    path.write_bytes(model.SerializeToString())
