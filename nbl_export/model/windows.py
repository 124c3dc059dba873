"""A window (`mixers.window`) of a layer's own attention, from a torch decoder of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbl_export.errors import NblError
from nbl_export.mixers.window import Window
from nbl_export.mixers.windowed import WindowShape
from nbl_export.model.architectures import architecture_of, unlike_llama
from nbl_export.model.checkpoint.pretrained import config_of
from nbl_export.model.linearize import multiplier_of
from nbl_export.model.one_layer import WeightReader, one_layer

__all__ = ["blank_windows", "window_layers"]

Take = Callable[..., np.ndarray]  # tensors -> one array of their rows


def window_layers(model: Any, layers: Iterable[int], tokens: int, tap: str) -> dict[int, Window]:
    """The windows of some layers.

    Args:
        model: a causal LM, or the directory of a checkpoint, of which one layer at a time is read.

    Raises:
        NblError: a layer's attention has parts that a window does not have.
    """
    if isinstance(model, Path):
        config, weights = config_of(model), WeightReader(model)
        return {i: _window(one_layer(config, i, weights), 0, i, tokens, tap, _array) for i in layers}
    decoder = model.get_decoder()
    return {i: _window(decoder, i, i, tokens, tap, _array) for i in layers}


def blank_windows(model: Any, layers: Iterable[int], tokens: int, tap: str) -> dict[int, Window]:
    """The same with zeros in place of weights, which take no memory; the model may be on torch's meta device."""
    decoder = model.get_decoder()
    return {i: _window(decoder, i, i, tokens, tap, _zeros) for i in layers}


@torch.no_grad()
def _window(decoder: Any, index: int, layer: int, tokens: int, tap: str, take: Take) -> Window:
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
    output, multiplier = take(attention.o_proj.weight), np.float32(multiplier_of(config))
    return Window(
        WindowShape(tokens, heads, kv_heads, size, float(attention.scaling) * factor**2),
        take(*(product.weight for product in products)),
        take(*(_bias(product) for product in products)),
        output if multiplier == 1 else output * multiplier,
        frequencies,
        None if norm is None else take(norm.weight),
        0.0 if norm is None else float(norm.variance_epsilon),
    )


def _bias(product: torch.nn.Linear) -> torch.Tensor:
    return product.weight.new_zeros(product.out_features) if product.bias is None else product.bias


def _array(*tensors: torch.Tensor) -> np.ndarray:
    return np.concatenate([tensor.detach().float().cpu().numpy() for tensor in tensors])


def _zeros(*tensors: torch.Tensor) -> np.ndarray:
    return np.broadcast_to(np.float32(0), (sum(map(len, tensors)), *tensors[0].shape[1:]))


def _rotary(decoder: Any, layer: int) -> tuple[np.ndarray, float]:
    """Frequencies of the pairs of a head, and the factor of queries and of keys."""
    rotary: Any = getattr(decoder, "rotary_emb", None)
    if getattr(rotary, "inv_freq", None) is None:
        raise NblError(f"layer {layer}: a window cannot stand for its attention: it has several rotary embeddings")
    with torch.device("cpu"):  # made again, since a model on the meta device holds no numbers
        made = type(rotary)(decoder.config)
    return _array(made.inv_freq), float(getattr(made, "attention_scaling", 1.0))


def _unsupported(attention: Any, config: Any, index: int) -> str | None:
    """What its attention has that a window does not have."""
    rope = getattr(config, "rope_parameters", None) or {}
    flat = rope.get("rope_type", "default") in ("default", "linear", "llama3")
    checks = (
        (not flat, f"its rotary embedding is of type {rope.get('rope_type')!r}"),
        (getattr(getattr(attention, "o_proj", None), "bias", None) is not None, "its output has a bias"),
    )
    return unlike_llama(attention, config, index) or next((reason for found, reason in checks if found), None)
