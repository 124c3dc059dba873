"""Attention above an exit layer for all positions at once, as the choice of an exit layer and training need it.

    query of token t     key of token s      the layer's own, if t - s < W or s = 0; else predicted

    a block of queries   begin .. end - 1
    reads keys           own 0   predicted 1 .. end - W - 1   own begin - W + 1 .. end - 1       and a mask says which

Every row continues. What is served (`methods.predicted_kv.torch_layers`) is exact for more keys: the last W rows of
a prompt see each other, and what leaves an upper layer for a row depends on its place in the prompt. Only blocks of
scores are in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from nbl_export.errors import NblError
from nbl_export.methods.modules import MixerModule, valid_rows
from nbl_export.methods.predicted_kv.products import KeyValueProducts, attention_by, taken_keys

__all__ = ["TeacherForcedAttention"]

_BLOCK = 128  # queries


class TeacherForcedAttention:
    """The forward of an attention module above an exit layer.

    Args:
        attention: calls transformers' attention functions. products: of it.
        module: gives the skipped tokens' keys and values, and has `recent_tokens`.
    """

    def __init__(self, attention: Any, products: KeyValueProducts, module: MixerModule) -> None:
        assert module.recent_tokens is not None
        self._attention = attention
        self._products = products
        self._module = module
        self._recent_tokens = module.recent_tokens

    def __call__(self, hidden_states: torch.Tensor, **given: Any) -> tuple[torch.Tensor, Any]:
        attention = self._attention
        tokens = hidden_states.shape[1]
        mask = given.get("attention_mask")
        if given.get("cache", given.get("past_key_values")) is not None:
            raise NblError("all positions above an exit layer are computed without a cache; give use_cache=False")
        if mask is not None and not valid_rows(mask, tokens).all():
            raise NblError("all positions above an exit layer are computed without padding")
        if tokens > self._recent_tokens + 1:
            predicted = self._module.predict(self._module.streams[self._module.reads[0]])
            skipped = taken_keys(attention, self._products, predicted, given)
            with attention_by(attention.config, partial(self._attend, skipped)):
                return self._own(hidden_states, given)
        return self._own(hidden_states, given)

    def _own(self, x_BTD: torch.Tensor, given: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        found: tuple[torch.Tensor, Any] = type(self._attention).forward(self._attention, x_BTD, **given)
        return found

    def _attend(
        self,
        skipped: Keys,
        _module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_: Any,
        **said: Any,
    ) -> tuple[torch.Tensor, None]:
        """What an attention function of transformers gives, [B, T, heads, head size]."""
        scores = Scores(float(said["scaling"]), *(said.get(name) for name in ("sliding_window", "softcap", "s_aux")))
        return attend(query, (key, value), skipped, self._recent_tokens, scores).transpose(1, 2), None


Keys = tuple[torch.Tensor, torch.Tensor]  # keys and values [B, heads of keys, T, head size]


@dataclass(frozen=True)
class Scores:
    """How attention weighs keys, as transformers calls an attention function.

    Attributes:
        scale: of products of queries and keys.
        window: keys that a query sees, itself included; None for all.
        cap: of scores, by tanh; None for none.
        sinks: a score of each head for no key; None for none.
    """

    scale: float
    window: int | None = None
    cap: float | None = None
    sinks: torch.Tensor | None = None

    def weighed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """[B, heads, queries, head size]; `seen` [queries, keys] says which keys a query sees."""
        if self.cap is None and self.sinks is None:
            return scaled_dot_product_attention(query, key, value, seen, scale=self.scale)
        scores = (query @ key.mT).float() * self.scale
        if self.cap is not None:
            scores = torch.tanh(scores / self.cap) * self.cap
        scores = scores.masked_fill(~seen, -torch.inf)
        if self.sinks is not None:
            sinks = self.sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], 3)
        return scores.softmax(3)[..., : key.shape[2]].to(value.dtype) @ value


def attend(query_BHTS: torch.Tensor, own: Keys, skipped: Keys, recent_tokens: int, scores: Scores) -> torch.Tensor:
    """Attention [B, heads, T, head size] over own keys and predicted KV, all rotated."""
    groups = query_BHTS.shape[1] // own[0].shape[1]
    tokens = query_BHTS.shape[2]
    blocks = []
    for begin in range(0, tokens, _BLOCK):
        end = min(begin + _BLOCK, tokens)
        skipped_S = torch.arange(1, max(1, end - recent_tokens))
        own_S = torch.arange(max(1, begin - recent_tokens + 1), end)
        key, value = (
            torch.cat([mine[:, :, :1], there[:, :, 1 : 1 + len(skipped_S)], mine[:, :, end - len(own_S) : end]], 2)
            for mine, there in zip(own, skipped, strict=True)
        )
        distance = torch.arange(begin, end)[:, None] - torch.cat([torch.zeros(1), skipped_S, own_S])
        seen = distance >= recent_tokens
        seen[:, 1 + len(skipped_S) :] = (distance >= 0)[:, 1 + len(skipped_S) :] & ~seen[:, 1 + len(skipped_S) :]
        seen[:, 0] = True
        if scores.window is not None:
            seen &= distance < scores.window
        query = query_BHTS[:, :, begin:end]
        key, value = (part.to(query.dtype).repeat_interleave(groups, 1) for part in (key, value))
        blocks.append(scores.weighed(query, key, value, seen.to(query.device)))
    return torch.cat(blocks, 2)
