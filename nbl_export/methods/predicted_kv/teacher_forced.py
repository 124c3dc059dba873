"""Attention above an exit layer for all positions at once, as the choice of an exit layer and training need it.

    query of token t     key of token s      the layer's own, if t - s < W or s = 0; else predicted

    a block of queries   begin .. end - 1
    reads keys           own 0   predicted 1 .. end - W - 1   own begin - W + 1 .. end - 1       and a mask says which

Every row continues. What is served (`methods.predicted_kv.torch_layers`) is exact for more keys: the last W rows of
a prompt see each other, and what leaves an upper layer for a row depends on its place in the prompt. Only blocks of
scores are in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from nbl_export.errors import NblError
from nbl_export.methods.modules import MixerModule, valid_rows
from nbl_export.methods.predicted_kv.torch_layers import as_heads, rotate

__all__ = ["TeacherForcedAttention"]

_BLOCK = 128  # queries


class TeacherForcedAttention:
    """The forward of an attention module above an exit layer.

    Args:
        attention: like llama's.
        module: gives the skipped tokens' keys and values, and has `recent_tokens`.
    """

    def __init__(self, attention: Any, module: MixerModule) -> None:
        assert module.recent_tokens is not None
        self._attention = attention
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
        if tokens <= self._recent_tokens + 1:
            found: tuple[torch.Tensor, Any] = type(attention).forward(attention, hidden_states, **given)
            return found
        turn = given["position_embeddings"]
        query, key, value = (
            as_heads(product(hidden_states), attention)
            for product in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        skipped_key, skipped_value = (
            as_heads(rows, attention) for rows in self._module.predict(self._module.streams[self._module.reads[0]])
        )
        query, key, skipped_key = (rotate(attention, heads, *turn) for heads in (query, key, skipped_key))
        mixed = attend(query, (key, value), (skipped_key, skipped_value), self._recent_tokens, float(attention.scaling))
        return attention.o_proj(mixed.transpose(1, 2).flatten(2)), None


Keys = tuple[torch.Tensor, torch.Tensor]  # keys and values [B, heads of keys, T, head size]


def attend(query_BHTS: torch.Tensor, own: Keys, skipped: Keys, recent_tokens: int, scale: float) -> torch.Tensor:
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
        query = query_BHTS[:, :, begin:end]
        key, value = (part.to(query.dtype).repeat_interleave(groups, 1) for part in (key, value))
        blocks.append(scaled_dot_product_attention(query, key, value, seen.to(query.device), scale=scale))
    return torch.cat(blocks, 2)
