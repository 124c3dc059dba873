"""A window (`mixers.window`) of a layer's own attention, from a torch decoder of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbl_export.errors import NblError
from nbl_export.mixers.window import Window
from nbl_export.mixers.windowed import WindowShape
from nbl_export.model.architectures import windows_of
from nbl_export.model.checkpoint.pretrained import config_of
from nbl_export.model.linearize import architecture_of, multiplier_of
from nbl_export.model.one_layer import WeightReader, one_layer

__all__ = ["window_layers"]


def window_layers(model: Any, layers: Iterable[int], tokens: int, tap: str) -> dict[int, Window]:
    """The windows of some layers.

    Args:
        model: a causal LM, or the directory of a checkpoint, of which one layer at a time is read.

    Raises:
        NblError: a layer's attention has parts that a window does not have.
    """
    if isinstance(model, Path):
        config, weights = config_of(model), WeightReader(model)
        return {i: _window(one_layer(config, i, weights), 0, i, tokens, tap) for i in layers}
    decoder = model.get_decoder()
    return {i: _window(decoder, i, i, tokens, tap) for i in layers}


@torch.no_grad()
def _window(decoder: Any, index: int, layer: int, tokens: int, tap: str) -> Window:
    """The window of a layer that has this index in the decoder."""
    block, config = decoder.layers[index], decoder.config
    attention, record = block.self_attn, architecture_of(config)
    frequencies, factor = _rotary(decoder, layer)
    if (reason := _unsupported(attention, config, index)) is not None:
        raise NblError(f"layer {layer}: a window cannot stand for its attention: {reason}")
    size = int(attention.head_dim)
    products = [attention.q_proj, attention.k_proj, attention.v_proj]
    heads, kv_heads = (product.out_features // size for product in products[:2])
    norm = getattr(block, record.norm_before) if tap == "residual" and record.norm_before else None
    return Window(
        WindowShape(tokens, heads, kv_heads, size, float(attention.scaling) * factor**2),
        np.concatenate([_array(product.weight) for product in products]),
        np.concatenate([_array(_bias(product)) for product in products]),
        _array(attention.o_proj.weight) * np.float32(multiplier_of(config)),
        frequencies,
        None if norm is None else _array(norm.weight),
        0.0 if norm is None else float(norm.variance_epsilon),
    )


def _bias(product: torch.nn.Linear) -> torch.Tensor:
    return product.weight.new_zeros(product.out_features) if product.bias is None else product.bias


def _array(tensor: torch.Tensor) -> np.ndarray:
    found: np.ndarray = tensor.detach().float().cpu().numpy().copy()
    return found


def _rotary(decoder: Any, layer: int) -> tuple[np.ndarray, float]:
    """Frequencies of the pairs of a head, and the factor of queries and of keys."""
    rotary = getattr(decoder, "rotary_emb", None)
    frequencies = getattr(rotary, "inv_freq", None)
    if frequencies is None:
        raise NblError(f"layer {layer}: a window cannot stand for its attention: it has several rotary embeddings")
    return _array(frequencies), float(getattr(rotary, "attention_scaling", 1.0))


def _unsupported(attention: Any, config: Any, index: int) -> str | None:
    """What its attention has that a window does not have."""
    record = architecture_of(config)
    rope = getattr(config, "rope_parameters", None) or {}
    flat = rope.get("rope_type", "default") in ("default", "linear", "llama3")
    checks = (
        (record.norm_after is not None, "it has a norm behind it"),
        (getattr(attention, "q_norm", None) is not None, "it norms queries and keys"),
        (record.fused_qkv is not None, "its queries, keys and values are one product"),
        (record.norm_offset != 0, "its norm adds to its weight"),
        (not flat, f"its rotary embedding is of type {rope.get('rope_type')!r}"),
        (bool(getattr(config, "no_rope_layers", None)), "some of its layers have no rotary embedding"),
        (windows_of(config)[index] is not None, "it has a window of its own, without the first token"),
        (getattr(getattr(attention, "o_proj", None), "bias", None) is not None, "its output has a bias"),
    )
    return next((reason for found, reason in checks if found), None)
