"""Layers above an exit layer as they are served: few rows of a step continue, and the keys of all others are predicted.

    rows of a step      0        1 .. T-W-1      T-W .. T-1          W: `recent_tokens`
                        first    skipped         recent
    layer               forward  -               forward             the layer's own code, on few rows
    its cache           own KV   predicted KV    own KV              in this order

A step is one call of the decoder: a prompt, a part of one, or one token. A step of at most W + 1 tokens is the
original's. A skipped row leaves a layer as NaN, since nobody may read it. A batch is padded on the left. Its first
row is each sequence's first valid one, and the shortest sequence says whether the step is the original's.

The choice of an exit layer needs every row instead (`methods.predicted_kv.teacher_forced`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nbl_export.errors import NblError
from nbl_export.methods.modules import MixerModule, valid_rows
from nbl_export.methods.predicted_kv.products import KeyValueProducts, taken_keys

__all__ = ["PrefillExitLayer", "check_served"]


class PrefillExitLayer:
    """The forward of a layer above an exit layer.

    Args:
        layer: of the decoder. products: of its attention.
        module: gives the layer's skipped tokens' keys and values.
        recent_tokens: W.
    """

    def __init__(self, layer: Any, products: KeyValueProducts, module: MixerModule, recent_tokens: int) -> None:
        self._layer = layer
        self._products = products
        self._module = module
        self._recent_tokens = recent_tokens

    def __call__(self, hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
        tokens = hidden_states.shape[1]
        if tokens <= self._recent_tokens + 1:
            return self._own(hidden_states, **given)
        first_B, shortest = _padding(given.get("attention_mask"), tokens)
        if shortest <= self._recent_tokens + 1:
            return self._own(hidden_states, **given)
        return self._exit_prefill(hidden_states, first_B, given)

    def _own(self, hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
        found: torch.Tensor = type(self._layer).forward(self._layer, hidden_states, **given)
        return found

    def _exit_prefill(self, x_BTD: torch.Tensor, first_B: torch.Tensor | None, given: dict[str, Any]) -> torch.Tensor:
        name = "cache" if "cache" in given else "past_key_values"  # as the version of transformers says
        cache = _growing(given.get(name))
        index = self._layer.self_attn.layer_idx
        recent = slice(-self._recent_tokens, None)
        mask = given.get("attention_mask")
        past = cache.get_seq_length(index) if mask is None else mask.shape[-1] - x_BTD.shape[1]
        given = {**given, name: cache}
        first_mask = None if mask is None else _first_mask(mask, first_B, past)
        first = self._own(_first(x_BTD, first_B), **_few(given, first_mask, lambda rows: _first(rows, first_B)))
        self._append(cache, x_BTD, first_B, given)
        seen = cache.layers[index].keys.shape[2] + self._recent_tokens  # a window keeps fewer than all
        recent_mask = _lower(x_BTD, past, self._recent_tokens) if mask is None else mask[:, :, recent]
        recent_tokens = self._own(
            x_BTD[:, recent], **_few(given, recent_mask[..., -seen:], lambda rows: rows[:, recent])
        )
        leaving = torch.full_like(x_BTD, torch.nan, dtype=recent_tokens.dtype)
        leaving[:, recent] = recent_tokens
        leaving[torch.arange(len(x_BTD)), 0 if first_B is None else first_B] = first[:, 0]
        return leaving

    def _append(self, cache: Any, x_BTD: torch.Tensor, first_B: torch.Tensor | None, given: dict[str, Any]) -> None:
        """Put the skipped rows into the cache, behind the first row."""
        skipped = x_BTD.shape[1] - self._recent_tokens
        attention = self._layer.self_attn
        held = cache.layers[attention.layer_idx]
        own = held.keys[:, :, -1], held.values[:, :, -1]
        stream_BTD = self._module.streams[self._module.reads[0]]
        keys, values = (part[:, 1:] for part in self._module.predict(stream_BTD[:, :skipped]))
        taken_keys(attention, self._products, (keys, values), _few(given, None, lambda rows: rows[:, 1:skipped]))
        if first_B is None:
            return
        for row in first_B.nonzero()[:, 0]:  # a padded row: the place of its first token is among the skipped ones
            place = held.keys.shape[2] - skipped + int(first_B[row])
            if place >= 0:  # within the window
                held.keys[row, :, place] = own[0][row]
                held.values[row, :, place] = own[1][row]


def _growing(cache: Any) -> Any:
    """The cache, or a new one if there is none."""
    from transformers import DynamicCache

    if getattr(cache, "is_compileable", False):
        raise NblError("an exit layer needs a cache that grows, such as DynamicCache")
    return DynamicCache() if cache is None else cache


def _padding(mask: torch.Tensor | None, tokens: int) -> tuple[torch.Tensor | None, int]:
    """Each sequence's first valid row of a step [B], None if that is 0 for all, and the shortest sequence."""
    if mask is None:
        return None, tokens
    if mask.ndim != 4:
        raise NblError("an exit layer needs masks of attention `sdpa` or `eager`; load the model with one of them")
    valid_BT = valid_rows(mask, tokens)
    first_B = valid_BT.int().argmax(1)
    count_B = valid_BT.sum(1)
    if (first_B + count_B != tokens).any():
        raise NblError(
            "an exit layer needs batches that are padded on the left; set the tokenizer's padding_side to left"
        )
    return (first_B if first_B.any() else None), int(count_B.min())


def _first(rows: torch.Tensor, first_B: torch.Tensor | None) -> torch.Tensor:
    """Each sequence's first valid row [B, 1, ...] of rows [B or 1, T, ...]."""
    if first_B is None:
        return rows[:, :1]
    return rows.expand(len(first_B), *rows.shape[1:])[torch.arange(len(first_B)), first_B][:, None]


def _few(given: dict[str, Any], mask: torch.Tensor | None, take: Any) -> dict[str, Any]:
    """The arguments of a layer for few of its rows."""
    found = {**given, "attention_mask": mask}
    found["position_embeddings"] = tuple(take(rows) for rows in given["position_embeddings"])
    if given.get("position_ids") is not None:
        found["position_ids"] = take(given["position_ids"])
    return found


def _lower(x_BTD: torch.Tensor, past: int, recent_tokens: int) -> torch.Tensor:
    """The causal mask of the recent rows [1, 1, W, P + T]; None would be read as causal at the upper left."""
    tokens = past + x_BTD.shape[1]
    return torch.ones(1, 1, recent_tokens, tokens, dtype=torch.bool, device=x_BTD.device).tril(tokens - recent_tokens)


def _first_mask(mask: torch.Tensor, first_B: torch.Tensor | None, past: int) -> torch.Tensor:
    """The mask of the first row [B, 1, 1, P + 1]; its own key is the last one in the cache when its query comes."""
    first = _first(mask.transpose(1, 2), first_B)
    own = first[..., past : past + 1] if first_B is None else first.gather(3, past + first_B[:, None, None, None])
    return torch.cat([first[..., :past], own], 3)


def check_served(modules: Mapping[int, Any], layers: int) -> None:
    """Require that all layers above one exit layer have modules.

    Raises:
        NblError: they have several exit layers, or a layer above the exit layer needs rows that do not continue.
    """
    found = {(module.exit_layer, module.recent_tokens) for module in modules.values()}
    if len(found) > 1:
        raise NblError("predicted KV of one model have one exit layer and one number of recent tokens")
    exit_layer = next(iter(found))[0]
    if above := [index for index in range(exit_layer, layers) if index not in modules]:
        raise NblError(f"layer {above[0]}: above the exit layer at layer {exit_layer}, it needs predicted KV")
