"""mobius, by the ONNX Runtime team: opset 24, fused to GroupQueryAttention and skip norms for the CPU.

`corrected` sets what mobius 0.1 reads wrong from a configuration, as the architecture's record says (`mobius`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from nbl_export.errors import MissingPackageError, NblError
from nbl_export.files import read_json
from nbl_export.graph.names import GENAI_CONFIG
from nbl_export.model.architectures import ARCHITECTURES
from nbl_export.targets.export.finish import captured
from nbl_export.trust.model_settings import read_object

__all__ = ["PRECISIONS", "build", "corrected", "refuse_lost_biases"]

_DTYPES = {"fp32": "f32", "fp16": "f16", "int8": "f32"}  # `targets.onnx.int8_rows` rounds to int8
PRECISIONS = tuple(_DTYPES)


def build(checkpoint: Path, out: Path, precision: str) -> None:
    """Write model.onnx, its data, genai_config.json and the tokenizer to `out`."""
    if precision not in _DTYPES:
        raise NblError(f"mobius makes no {precision} graph; use --precision {', '.join(_DTYPES)}, or the genai source")
    try:
        from mobius.__main__ import main as mobius_cli
    except ImportError as error:
        raise MissingPackageError("mobius-onnx", "export", "building the decoder graph") from error
    refuse_lost_biases(checkpoint)
    arguments = ["build", "--config", str(checkpoint), "--ep", "cpu", "--dtype", _DTYPES[precision]]
    with captured("mobius", checkpoint), corrected(checkpoint):
        mobius_cli([*arguments, "--runtime", "ort-genai", str(out)])
    _restore_config(checkpoint, out / GENAI_CONFIG)
    from nbl_export.targets.export.restore_attention import restore_attention

    restore_attention(checkpoint, out)


@contextlib.contextmanager
def corrected(checkpoint: Path) -> Iterator[None]:
    """Within: the configuration that mobius makes of transformers' has the settings of the architecture's record."""
    from mobius import ArchitectureConfig

    settings = ARCHITECTURES[_config(checkpoint)["model_type"]].mobius
    theirs = ArchitectureConfig.from_transformers

    def ours(config: Any, **more: Any) -> Any:
        made = theirs(config, **more)
        rope = made.rope and dataclasses.replace(made.rope, **{k: v for k, v in settings.items() if k in _OF_ROPE})
        return dataclasses.replace(made, rope=rope, **settings)

    with mock.patch.object(ArchitectureConfig, "from_transformers", ours) if settings else contextlib.nullcontext():
        yield


_OF_ROPE = ("rope_interleave",)  # also a field of the rotary settings


def _config(checkpoint: Path) -> dict[str, Any]:
    return read_object(checkpoint / "config.json")


def refuse_lost_biases(checkpoint: Path) -> None:
    """Refuse a model whose MLP has biases: mobius 0.1 leaves them out of the graph.

    Raises:
        NblError: the configuration says mlp_bias.
    """
    if _config(checkpoint).get("mlp_bias"):
        raise NblError(
            f"{checkpoint} has biases in its MLPs (mlp_bias), which mobius (0.1) leaves out; use the key "
            "decoder_source = 'genai'"
        )


def _restore_config(checkpoint: Path, path: Path) -> None:
    """Set the model's context length (mobius 0.1 writes 4096 for every model), and a type that GenAI knows."""
    config = _config(checkpoint)
    positions = _positions(config)
    record = ARCHITECTURES[config["model_type"]]
    settings = read_json(path)
    settings["model"]["context_length"] = settings["search"]["max_length"] = positions
    if record.runtime_type is not None:
        settings["model"]["type"] = record.runtime_type
    path.write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")


def _positions(config: Mapping[str, Any]) -> int:
    """Positions that the graph computes rightly: mobius 0.1 leaves out the factor of Ministral 3's queries beyond."""
    most: int = config["max_position_embeddings"]
    rope = config.get("rope_parameters") or {}
    return min(most, rope["original_max_position_embeddings"]) if rope.get("llama_4_scaling_beta") else most
