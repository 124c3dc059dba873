"""Decoders of a random checkpoint with a model's shape, with and without an exit layer, for bench/runtimes.py.

    python bench/exit_shapes.py TOKENIZER Qwen3-0.6B DIR [EXIT_LAYER]
    python bench/runtimes.py DIR/checkpoint "ONNX Runtime=genai:DIR/ort" "ONNX Runtime, predicted KV=genai:DIR/ort-nbl"
        "OpenVINO=openvino:DIR/openvino" "OpenVINO, predicted KV=openvino:DIR/openvino-nbl" --lengths 512,2048

TOKENIZER is a directory with tokenizer.json. Weights and maps are random, so answers mean nothing. All folders are
int8. Without EXIT_LAYER, the exit layer stands at two thirds of the layers. 128 recent tokens continue.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from shapes import random_checkpoint

from nbl_export.methods.checkpoint.load import read_spec
from nbl_export.methods.checkpoint.source import resolve
from nbl_export.methods.predicted_kv.maps import PredictedKV
from nbl_export.targets import load_engine
from nbl_export.targets.base import ExportSettings

RECENT_TOKENS = 128
# From config.json of the models on their hub.
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                     "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
                     "max_position_embeddings": 8192, "tie_word_embeddings": True},
    "Qwen2.5-0.5B": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                     "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
                     "max_position_embeddings": 32768, "tie_word_embeddings": True},
    "Qwen3-0.6B": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
                   "max_position_embeddings": 40960, "tie_word_embeddings": True},
    "Gemma-3-1B": {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912,
                   "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
                   "vocab_size": 262144, "max_position_embeddings": 32768, "sliding_window": 512,
                   "query_pre_attn_scalar": 256, "tie_word_embeddings": True},
    "Qwen2.5-1.5B": {"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                     "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
                     "max_position_embeddings": 32768, "tie_word_embeddings": True},
    "Llama-3.2-1B": {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
                     "max_position_embeddings": 131072, "tie_word_embeddings": True},
    "Phi-4-mini": {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
                   "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064,
                   "max_position_embeddings": 131072, "original_max_position_embeddings": 131072,
                   "partial_rotary_factor": 0.75, "sliding_window": None, "pad_token_id": 199999,
                   "tie_word_embeddings": True},
}  # fmt: skip


def random_maps(checkpoint: Path, exit_layer: int | None) -> dict[int, PredictedKV]:
    """Small random maps of the layers from an exit layer up; None stands for two thirds of the layers."""
    spec = read_spec(resolve(str(checkpoint)))
    if exit_layer is None:
        exit_layer = round(2 * spec.num_layers / 3)
    width = 2 * spec.num_kv_heads * spec.head_dim
    rng = np.random.default_rng(0)
    shape = (width, 2 * spec.hidden_size)
    return {
        layer: PredictedKV(
            rng.standard_normal(shape, np.float32) / spec.hidden_size, np.zeros(width, np.float32),
            spec.hidden_size, exit_layer, RECENT_TOKENS, 1e-6,
        )
        for layer in range(exit_layer, spec.num_layers)
    }  # fmt: skip


def main(tokenizer: Path, shape: str, out: Path, exit_layer: int | None) -> None:
    """Write the checkpoint and the four folders."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint"
    random_checkpoint(SHAPES[shape], tokenizer, checkpoint)
    maps = random_maps(checkpoint, exit_layer)
    rows_BT = np.random.default_rng(0).integers(100, 40_000, (4, 512))
    for name, source in (("ort", "genai"), ("openvino", "openvino")):
        engine = load_engine(name)
        shutil.rmtree(out / name, ignore_errors=True)
        engine.export(checkpoint, out / name, ExportSettings(source, "int8", 0, (), rows_BT=rows_BT))
        engine.keep_last_token(out / name)
        shutil.rmtree(out / f"{name}-nbl", ignore_errors=True)
        engine.linearize(out / name, out / f"{name}-nbl", maps)
    print(json.dumps({"shape": shape, "exit_layer": min(maps), "recent_tokens": RECENT_TOKENS}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]) if sys.argv[4:] else None)
