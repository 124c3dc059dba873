"""A checkpoint with safetensors as GGUF content, by llama.cpp's names of keys and tensors.

    model.layers.{i}.self_attn.{q,k,v,o}_proj   blk.{i}.attn_{q,k,v,output}
    model.layers.{i}.mlp.{gate,up,down}_proj    blk.{i}.ffn_{gate,up,down}
    input_layernorm, post_attention_layernorm   attn_norm, ffn_norm

llama.cpp pairs neighbouring rows of a Llama's queries and keys in the rotary embedding, where transformers pairs the
halves of a head, so these rows are exchanged.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import NblError
from nbl_export.graph.gguf.content import Content, Key, Tensor
from nbl_export.graph.gguf.tokenizer_keys import tokenizer_keys
from nbl_export.targets.gguf.linearize import exchanged
from nbl_export.trust.model_settings import read_object

__all__ = ["check_config", "content_of"]

_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
_WHY = {
    "qwen3": "norms of queries and keys",
    "phi3": "fused projections",
    "gemma2": "norms behind attention",
    "gemma3_text": "norms behind attention",
    "olmo2": "norms behind attention",
    "smollm3": "layers without rotary embedding",
    **dict.fromkeys(("granite", "granitemoehybrid"), "multipliers"),
}
_CONFIG_BYTES = 1 << 20


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Refuse a model that llama.cpp's architecture `deci` does not compute, before anything is read.

    Raises:
        NblError: the message has the reason.
    """
    kind = str(config.get("model_type"))
    if kind not in _ARCHITECTURES:
        raise NblError(
            f"{where}: llama.cpp runs linear layers in its architecture deci, which has no place for the "
            f"{_WHY.get(kind, 'structure')} of {kind}; supported are {', '.join(_ARCHITECTURES)}"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise NblError(f"{where}: llama.cpp's architecture deci computes SiLU, not {config['hidden_act']}")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise NblError(f"{where}: llama.cpp's architecture deci computes no sliding window")
    scaling = _scaling(config)
    if scaling.get("rope_type", "default") not in ("default", "linear", "yarn", "llama3"):
        raise NblError(f"{where}: rotary embeddings of type {scaling['rope_type']} have no place in GGUF's deci")


def content_of(directory: Path) -> Content:
    """Keys and tensors of a checkpoint; tensors keep float32 and float16, and bfloat16 as BF16.

    Raises:
        NblError: the model or its tokenizer has no GGUF form.
    """
    config = read_object(directory / "config.json", _CONFIG_BYTES)
    check_config(config, directory)
    architecture = _ARCHITECTURES[config["model_type"]]
    keys = {**_keys(config, architecture, directory), **tokenizer_keys(directory, int(config["vocab_size"]))}
    return Content(architecture, keys, tuple(_tensors(directory, config)))


def _scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {**found, "rope_type": found.get("rope_type", found.get("type", "default"))}


def _keys(config: Mapping[str, Any], architecture: str, directory: Path) -> dict[str, Key]:
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or config["hidden_size"] // heads)
    scaling = _scaling(config)
    base = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    keys = {
        "block_count": Key.number(config["num_hidden_layers"]),
        "context_length": Key.number(config["max_position_embeddings"]),
        "embedding_length": Key.number(config["hidden_size"]),
        "feed_forward_length": Key.number(config["intermediate_size"]),
        "vocab_size": Key.number(config["vocab_size"]),
        "attention.head_count": Key.number(heads),
        "attention.head_count_kv": Key.number(config.get("num_key_value_heads") or heads),
        "attention.key_length": Key.number(head),
        "attention.value_length": Key.number(head),
        "attention.layer_norm_rms_epsilon": Key.real(config["rms_norm_eps"]),
        "rope.dimension_count": Key.number(head),
        "rope.freq_base": Key.real(base),
    }
    if scaling["rope_type"] in ("linear", "yarn"):
        keys["rope.scaling.type"] = Key.text(scaling["rope_type"])
        keys["rope.scaling.factor"] = Key.real(scaling["factor"])
    if scaling["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = Key.number(scaling["original_max_position_embeddings"])
    return {"general.name": Key.text(directory.absolute().name), **{f"{architecture}.{n}": k for n, k in keys.items()}}


def _tensors(directory: Path, config: Mapping[str, Any]) -> Iterator[Tensor]:
    from gguf import GGMLQuantizationType
    from safetensors import safe_open

    heads = {"attn_q": config["num_attention_heads"],
             "attn_k": config.get("num_key_value_heads") or config["num_attention_heads"]}  # fmt: skip
    exchange = _ARCHITECTURES[config["model_type"]] == "llama"
    scaling = _scaling(config)
    if scaling["rope_type"] == "llama3":
        factors = _llama3_factors(config, scaling)
        yield Tensor("rope_freqs.weight", factors.shape, GGMLQuantizationType.F32, lambda: factors)
    for file in _files(directory):
        with safe_open(str(file), framework="pt") as opened:
            names = list(opened.keys())
        for name in names:
            ours = _our_name(name)
            if ours is None or (ours == "output.weight" and config.get("tie_word_embeddings")):
                continue
            part = ours.split(".")[-2] if exchange else ""
            yield _tensor(file, name, ours, int(heads.get(part, 0)))


def _files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return [directory / "model.safetensors"]
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [directory / name for name in sorted(set(names))]


def _our_name(name: str) -> str | None:
    """GGUF's name of a tensor; None for one that GGUF leaves out.

    Raises:
        NblError: the tensor is of no Llama.
    """
    layer = _LAYER.fullmatch(name)
    if layer is not None and layer[2] in _NAMES:
        return f"blk.{layer[1]}.{_NAMES[layer[2]]}.{layer[3]}"
    module, _, kind = name.rpartition(".")
    if module in _NAMES:
        return f"{_NAMES[module]}.{kind}"
    if name.endswith("rotary_emb.inv_freq"):
        return None
    raise NblError(f"the checkpoint has {name}, which llama.cpp's architecture deci has no place for")


def _tensor(file: Path, name: str, ours: str, heads: int) -> Tensor:
    """A tensor of a safetensors file; vectors become float32, as llama.cpp computes them. heads: 0 for no exchange."""
    import torch
    from gguf import GGMLQuantizationType
    from safetensors import safe_open

    def load() -> torch.Tensor:
        with safe_open(str(file), framework="pt") as opened:
            return opened.get_tensor(name)

    with safe_open(str(file), framework="pt") as opened:
        part = opened.get_slice(name)
        shape, dtype = tuple(part.get_shape()), part.get_dtype()
    kind = GGMLQuantizationType[dtype] if len(shape) > 1 and dtype in ("F16", "BF16") else GGMLQuantizationType.F32

    def read() -> np.ndarray:
        found = load()
        if kind == GGMLQuantizationType.BF16:
            stored = found.contiguous().view(torch.uint8).reshape(*shape[:-1], 2 * shape[-1]).numpy()
        else:
            stored = found.to(torch.float16 if kind == GGMLQuantizationType.F16 else torch.float32).numpy()
        return exchanged(stored, heads) if heads else stored

    return Tensor(ours, shape, kind, read)


def _llama3_factors(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> np.ndarray:
    """Divisors of the rotary frequencies [head / 2] of Llama 3.1 (transformers, modeling_rope_utils, llama3)."""
    head = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    base = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    wavelengths = 2 * math.pi * base ** (np.arange(0, head, 2) / head)
    low, high, old = (float(scaling[n]) for n in
                      ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))  # fmt: skip
    factor = float(scaling["factor"])
    smooth = (old / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    found = np.where(wavelengths < old / high, 1.0, np.where(wavelengths > old / low, factor, between))
    return found.astype(np.float32)
