"""GGUF files of tiny random models whose matrices have chosen types."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .tiny import LAYERS, VOCAB, _tokenizer

__all__ = ["HALVES", "save_as", "save_mixed"]

WIDE = 256  # hidden size: K-quants have blocks of 256
# type -> float16 fields of a block, by place: sizes that make weights of about 0.1
HALVES: dict[str, dict[int, float]] = {
    "Q4_0": {0: 2e-2}, "Q4_1": {0: 2e-2, 2: -0.15}, "Q5_0": {0: 1e-2}, "Q5_1": {0: 1e-2, 2: -0.15}, "Q8_0": {0: 1.5e-3},
    "Q2_K": {80: 6e-3, 82: 6e-3}, "Q3_K": {108: 1.5e-3}, "Q4_K": {0: 3e-4, 2: 2.3e-3}, "Q5_K": {0: 1.5e-4, 2: 2.3e-3},
    "Q6_K": {208: 5e-5},
}  # fmt: skip


def random_blocks(kind: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Stored bytes of a random matrix [rows, bytes of a row]; every code and scale of a block occurs."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    size, width = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (rows * columns // size, width), dtype=np.uint8)
    for place, about in HALVES[kind].items():
        values = (about * rng.uniform(0.5, 1.5, (len(blocks), 1))).astype(np.float16)
        blocks[:, place : place + 2] = values.view(np.uint8)
    return blocks.reshape(rows, -1)


def save_mixed(path: Path, kinds: Mapping[str, str], head: str | None = None) -> Path:
    """Write the Llama.

    Args:
        kinds: type of each matrix, by its name without layer and ".weight"; "F32" is allowed.
        head: type of a head of its own; None ties the head to the embedding.
    """
    import gguf

    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 512), (writer.add_embedding_length, WIDE), (writer.add_block_count, LAYERS),
        (writer.add_feed_forward_length, WIDE), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
        (writer.add_rope_dimension_count, WIDE // 4), (writer.add_vocab_size, VOCAB), (writer.add_bos_token_id, 0),
        (writer.add_eos_token_id, 1),
    ):  # fmt: skip
        add(value)
    writer.add_layer_norm_rms_eps(1e-6)
    _add_tokenizer(writer)
    rows = {"attn_k": WIDE // 2, "attn_v": WIDE // 2}
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    matrices = {f"blk.{i}.{part}": (rows.get(part, WIDE), kinds[part]) for i in range(LAYERS) for part in parts}
    matrices["token_embd"] = (VOCAB, kinds["token_embd"])
    matrices |= {} if head is None else {"output": (VOCAB, head)}
    for name, (count, kind) in matrices.items():
        if kind == "F32":
            writer.add_tensor(f"{name}.weight", rng.standard_normal((count, WIDE)).astype(np.float32) / 8)
        else:
            stored = random_blocks(kind, count, WIDE, rng)
            writer.add_tensor(f"{name}.weight", stored, raw_dtype=gguf.GGMLQuantizationType[kind])
    for name in ("output_norm", *(f"blk.{i}.{norm}" for i in range(LAYERS) for norm in ("attn_norm", "ffn_norm"))):
        writer.add_tensor(f"{name}.weight", np.ones(WIDE, np.float32))
    _end(writer)
    return path


def save_as(architecture: str, directory: Path, path: Path) -> Path:
    """Write a checkpoint as a GGUF file whose matrices have five types in turn.

    Rows and norms are left as they are, so this is another model than llama.cpp makes of the checkpoint.

    Args:
        architecture: name in GGUF.
    """
    import gguf
    import torch
    from safetensors.numpy import load_file
    from transformers.modeling_gguf_pytorch_utils import (
        GGUF_TO_TRANSFORMERS_MAPPING,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    from nbl_export.model.checkpoint.pretrained import config_of, model_with

    config, writer = config_of(directory), gguf.GGUFWriter(path, architecture)
    for key, name in GGUF_TO_TRANSFORMERS_MAPPING["config"][architecture].items():
        value = getattr(config, name or "", None)
        if value is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{architecture}.{key}", value)
    _add_tokenizer(writer)
    for add, token in ((writer.add_bos_token_id, 0), (writer.add_eos_token_id, 1), (writer.add_pad_token_id, 1)):
        add(token)
    with torch.device("meta"):
        names = get_gguf_hf_weights_map(model_with(config), TensorProcessor())
    stored = load_file(directory / "model.safetensors")
    kinds = itertools.cycle(gguf.GGMLQuantizationType[kind] for kind in ("Q8_0", "Q4_0", "F16", "F32", "BF16"))
    for ours, theirs in names.items():
        if theirs in stored:  # a tied head is not
            values = stored[theirs].astype(np.float32)
            kind = next(kinds) if values.ndim > 1 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(ours, gguf.quants.quantize(values, kind), raw_dtype=kind)
    _end(writer)
    return path


def _add_tokenizer(writer: Any) -> None:
    said = json.loads(_tokenizer().backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(said["vocab"], key=said["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in said["merges"]])


def _end(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
