"""mobius, by the ONNX Runtime team: opset 24, fused to GroupQueryAttention and skip norms for the CPU."""

from __future__ import annotations

import json
from pathlib import Path

from nbl_export.decoders.quiet import captured
from nbl_export.errors import MissingPackageError, NblError

__all__ = ["PRECISIONS", "build"]

_DTYPES = {"fp32": "f32", "fp16": "f16"}
PRECISIONS = tuple(_DTYPES)


def build(checkpoint: Path, out: Path, precision: str) -> None:
    """Write model.onnx, its data, genai_config.json and the tokenizer to `out`."""
    if precision not in _DTYPES:
        raise NblError(f"mobius makes no {precision} graph; use --precision {', '.join(_DTYPES)}, or the genai source")
    try:
        from mobius.__main__ import main as mobius_cli
    except ImportError as error:
        raise MissingPackageError("mobius-onnx", "export", "building the decoder graph") from error
    arguments = ["build", "--config", str(checkpoint), "--ep", "cpu", "--dtype", _DTYPES[precision]]
    with captured("mobius", checkpoint):
        mobius_cli([*arguments, "--runtime", "ort-genai", str(out)])
    _state_context(checkpoint, out / "genai_config.json")


def _state_context(checkpoint: Path, path: Path) -> None:
    """Put the model's context length where mobius (0.1) writes 4096 for every model."""
    positions = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["model"]["context_length"] = settings["search"]["max_length"] = positions
    path.write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")
