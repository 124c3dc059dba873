"""Maps of a tiny model with an exit layer, and what torch computes above it, from caches edited by hand."""

from __future__ import annotations

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
    past, first, kept = cache.get_seq_length(), _copied(cache), DynamicCache()
    whole = model(text, cache=_copied(cache), output_hidden_states=True)
    logits = torch.full_like(whole.logits, torch.nan)
    logits[:, :1] = model(text[:, :1], cache=first).logits
    tables = model.model.rotary_emb(text.float(), torch.arange(past + 1, past + tokens - recent_tokens)[None])
    for layer, held in enumerate(whole.cache.layers):
        keys, values = held.keys[:, :, :-recent_tokens], held.values[:, :, :-recent_tokens]
        if layer in maps:
            long_range = predicted(maps[layer], whole.hidden_states[exit_layer])[:, 1:-recent_tokens].unflatten(
                2, (-1, keys.shape[-1])
            )
            far_keys, far_values = long_range.transpose(1, 2).chunk(2, 1)
            keys = torch.cat([first.layers[layer].keys, _turned(far_keys, *tables)], 2)
            values = torch.cat([first.layers[layer].values, far_values], 2)
        kept.update(keys, values, layer)
    logits[:, -recent_tokens:] = model(text[:, -recent_tokens:], cache=kept).logits
    return logits, kept


def predicted(mixer: PredictedKV, x_BTD: torch.Tensor) -> torch.Tensor:
    """Keys and values [B, T, 2 K] by the map's numbers."""
    x = x_BTD / (x_BTD.square().mean(2, keepdim=True) + mixer.epsilon).sqrt()
    x = torch.cat([x, x.roll(1, 1)], 2)
    return x @ torch.from_numpy(mixer.weight).T + torch.from_numpy(mixer.bias)


def _turned(keys_BHTS: torch.Tensor, cos_1TR: torch.Tensor, sin_1TR: torch.Tensor) -> torch.Tensor:
    """Keys of which the first R numbers are rotated."""
    width = cos_1TR.shape[-1]
    turning = keys_BHTS[..., :width]
    across = torch.cat([-turning[..., width // 2 :], turning[..., : width // 2]], -1)
    return torch.cat([turning * cos_1TR[:, None] + across * sin_1TR[:, None], keys_BHTS[..., width:]], -1)


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
