"""Maps of a tiny model with an exit layer, and what torch computes above it, from caches edited by hand."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from nbl_export.methods.predicted_kv.maps import PredictedKV
from tests.tiny import EPSILON, HIDDEN, LAYERS, VOCAB

__all__ = ["CLOSE", "apart", "by_hand", "chunks_of", "predicted", "predicted_maps", "torch_logits"]

CLOSE = 1e-5


def predicted_maps(
    exit_layer: int, recent_tokens: int, keys: int, size: int = HIDDEN, layers: int = LAYERS
) -> dict[int, PredictedKV]:
    """Random maps of the layers from the exit layer up.

    Args:
        keys: K, the numbers of a token's keys. size: D.
    """
    found = {}
    for layer in range(exit_layer, layers):
        rng = np.random.default_rng(layer)
        weight = (rng.standard_normal((2 * keys, 2 * size)) / 6).astype(np.float32)
        found[layer] = PredictedKV(
            weight, rng.standard_normal(2 * keys).astype(np.float32), size, exit_layer, recent_tokens, EPSILON
        )
    return found


def chunks_of(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Token ids [1, T] of consecutive chunks."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB, (1, length)) for length in lengths]


def torch_logits(model: Any, maps: Mapping[int, PredictedKV], chunks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Logits [T, V] of each chunk of one sequence, NaN for tokens that do not continue."""
    cache, found = DynamicCache(), []
    for chunk in chunks:
        with torch.inference_mode():
            logits, cache = by_hand(model, maps, cache, torch.from_numpy(chunk))
        found.append(logits[0].numpy())
    return found


def by_hand(
    model: Any, maps: Mapping[int, PredictedKV], cache: DynamicCache, text: torch.Tensor
) -> tuple[torch.Tensor, DynamicCache]:
    """Logits [B, T, V] of a step, NaN for rows that do not continue, and the cache behind it, by the original alone."""
    (exit_layer, recent_tokens), tokens = (
        {(mixer.exit_layer, mixer.recent_tokens) for mixer in maps.values()}.pop(),
        text.shape[1],
    )
    if tokens <= recent_tokens + 1:
        return model(text, cache=cache).logits, cache
    turns: dict[int, Any] = {}
    first, kept = _copied(cache), DynamicCache()
    handles = [
        layer.self_attn.register_forward_pre_hook(_keep_turn(turns, index), with_kwargs=True)
        for index, layer in enumerate(model.model.layers)
    ]
    whole = model(text, cache=_copied(cache), output_hidden_states=True)
    for handle in handles:
        handle.remove()
    logits = torch.full_like(whole.logits, torch.nan)
    logits[:, :1] = model(text[:, :1], cache=first).logits
    for layer, held in enumerate(whole.cache.layers):
        keys, values = held.keys[:, :, :-recent_tokens], held.values[:, :, :-recent_tokens]
        if layer in maps:
            rows = predicted(maps[layer], whole.hidden_states[exit_layer])[:, 1:-recent_tokens]
            far_keys, far_values = rows.chunk(2, 2)
            turn = [table[:, 1:-recent_tokens] for table in turns[layer]]
            far_keys = attended(model.model.layers[layer].self_attn, far_keys, turn)
            far_values = far_values.unflatten(2, (-1, keys.shape[-1])).transpose(1, 2)
            keys = torch.cat([first.layers[layer].keys, far_keys], 2)
            values = torch.cat([first.layers[layer].values, far_values], 2)
        kept.update(keys, values, layer)
    logits[:, -recent_tokens:] = model(text[:, -recent_tokens:], cache=kept).logits
    return logits, kept


def predicted(mixer: PredictedKV, x_BTD: torch.Tensor) -> torch.Tensor:
    """Keys and values [B, T, 2 K] by the map's numbers."""
    x = x_BTD / (x_BTD.square().mean(2, keepdim=True) + mixer.epsilon).sqrt()
    x = torch.cat([x, x.roll(1, 1)], 2)
    return x @ torch.from_numpy(mixer.weight).T + torch.from_numpy(mixer.bias)


def _keep_turn(turns: dict[int, Any], index: int) -> Any:
    """A hook that keeps the rotary tables that a layer gets."""

    def keep(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        turns[index] = given["position_embeddings"]

    return keep


def attended(attention: Any, keys_BTK: torch.Tensor, turn: Sequence[torch.Tensor]) -> torch.Tensor:
    """Keys [B, heads, T, head size] as a layer attends to them, from what its product gives."""
    before: Any = getattr(attention, "k_norm", getattr(attention, "k_layernorm", None))
    behind = getattr(attention, "key_layernorm", None)
    full = getattr(before, "weight", None) is not None and before.weight.numel() == keys_BTK.shape[2]
    keys = before(keys_BTK) if full else keys_BTK
    keys = keys.unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
    keys = keys if full or before is None else before(keys)
    local = getattr(attention, "sliding_window", None) is None or getattr(attention, "is_sliding", True)
    if getattr(attention, "use_rope", True) and local:
        doubled = 2 if 2 * turn[0].shape[-1] == keys.shape[-1] else 1  # tables of half a head
        width = getattr(attention, "rotary_ndims", doubled * turn[0].shape[-1])
        apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        turned = apply(keys[..., :width], keys[..., :width], *turn)[1]
        keys = torch.cat([turned, keys[..., width:]], -1)
    return keys if behind is None else behind(keys)


def _copied(cache: DynamicCache) -> DynamicCache:
    made = DynamicCache()
    for index, layer in enumerate(cache.layers):
        made.update(layer.keys, layer.values, index)
    return made


def apart(found: np.ndarray, right: np.ndarray) -> float:
    """The largest difference over the size of the logits; infinite if other rows are NaN."""
    rows = ~np.isnan(right).any(1)
    if (np.isnan(found).any(1) == rows).any():
        return float("inf")
    return float(np.abs(found[rows] - right[rows]).max() / np.abs(right[rows]).max())
