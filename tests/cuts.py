"""Maps of a tiny model's cut, and what torch computes behind it, from caches edited by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nbl_export.mixers.predicted import Predicted

from .tiny import EPSILON, HIDDEN, LAYERS, VOCAB

__all__ = ["CLOSE", "apart", "chunks_of", "predicted_maps", "torch_logits"]

CLOSE = 1e-5


def predicted_maps(
    cut: int, near: int, keys: int, size: int = HIDDEN, layers: int = LAYERS, *, before: bool = True
) -> dict[int, Predicted]:
    """Random maps of the layers from `cut` up.

    Args:
        keys: K, the numbers of a token's keys. size: D.
    """
    found = {}
    for layer in range(cut, layers):
        rng = np.random.default_rng(layer)
        weight = (rng.standard_normal((2 * keys, size * (1 + before))) / 6).astype(np.float32)
        found[layer] = Predicted(weight, rng.standard_normal(2 * keys).astype(np.float32), size, cut, near, EPSILON)
    return found


def chunks_of(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Token ids [1, T] of consecutive chunks."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB, (1, length)) for length in lengths]


def torch_logits(model: Any, maps: dict[int, Predicted], chunks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Logits [T, V] of each chunk of one sequence, NaN for tokens that do not climb."""
    from transformers import DynamicCache

    (cut, near), cache = {(mixer.cut, mixer.near) for mixer in maps.values()}.pop(), DynamicCache()

    def run(ids: torch.Tensor) -> Any:
        return model(ids, past_key_values=cache, use_cache=True, output_hidden_states=True)

    found = []
    for chunk in chunks:
        ids = torch.from_numpy(chunk)
        logits = torch.full((ids.shape[1], VOCAB), torch.nan)
        with torch.inference_mode():
            if ids.shape[1] <= near + 1:
                logits[:] = run(ids).logits[0]
            else:
                place = cache.get_seq_length()
                first, far = run(ids[:, :1]), run(ids[:, 1:-near])
                stream = torch.cat([first.hidden_states[cut], far.hidden_states[cut]], 1)[0]
                for layer, mixer in maps.items():
                    _predict(model, cache.layers[layer], mixer, stream, place + 1)
                logits[0], logits[-near:] = first.logits[0, 0], run(ids[:, -near:]).logits[0]
        found.append(logits.numpy())
    return found


def _predict(model: Any, held: Any, mixer: Predicted, stream_TD: torch.Tensor, place: int) -> None:
    """Put keys and values of the rows but the first into the end of a layer's cache, from position `place` on."""
    x = stream_TD / (stream_TD.square().mean(-1, keepdim=True) + mixer.epsilon).sqrt()
    features = torch.cat([x[1:], x[:-1]], 1) if mixer.before else x[1:]
    made = features @ torch.from_numpy(mixer.weight).T + torch.from_numpy(mixer.bias)
    keys, values = (half.view(len(half), held.keys.shape[1], -1).transpose(0, 1) for half in made.chunk(2, 1))
    cos, sin = model.model.rotary_emb(made, torch.arange(place, place + len(made))[None])
    width = cos.shape[-1]
    turning = keys[..., :width]
    turned = torch.cat([-turning[..., width // 2 :], turning[..., : width // 2]], -1)
    held.keys[0, :, place:, :width] = turning * cos[0] + turned * sin[0]
    held.keys[0, :, place:, width:] = keys[..., width:]
    held.values[0, :, place:] = values


def apart(found: np.ndarray, right: np.ndarray) -> float:
    """The largest difference over the size of the logits; infinite if other rows are NaN."""
    rows = ~np.isnan(right).any(1)
    if (np.isnan(found).any(1) == rows).any():
        return float("inf")
    return float(np.abs(found[rows] - right[rows]).max() / np.abs(right[rows]).max())
