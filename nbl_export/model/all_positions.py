"""Attention above a cut for all positions at once, as the choice of a cut and training need it.

    query of token t     key of token s      the layer's own, if t - s < W or s = 0; else predicted

    a block of queries   begin .. end - 1
    reads keys           own 0   predicted 1 .. end - W - 1   own begin - W + 1 .. end - 1       and a mask says which

Every row climbs. What is served (`model.cut`) is exact for more keys: the last W rows of a prompt see each other, and
what leaves an upper layer for a row depends on its place in the prompt. Only blocks of scores are in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from nbl_export.errors import NblError
from nbl_export.mixers.modules import MixerModule, valid_rows
from nbl_export.model.cut import as_heads, rotate

__all__ = ["Everywhere"]

_BLOCK = 128  # queries


class Everywhere:
    """The forward of an attention module above a cut.

    Args:
        attention: like llama's.
        module: gives the far keys and values, and has `near`.
    """

    def __init__(self, attention: Any, module: MixerModule) -> None:
        assert module.near is not None
        self._attention = attention
        self._module = module
        self._near = module.near

    def __call__(self, hidden_states: torch.Tensor, **given: Any) -> tuple[torch.Tensor, Any]:
        attention = self._attention
        tokens = hidden_states.shape[1]
        mask = given.get("attention_mask")
        if given.get("cache", given.get("past_key_values")) is not None:
            raise NblError("all positions above a cut are computed without a cache; give use_cache=False")
        if mask is not None and not valid_rows(mask, tokens).all():
            raise NblError("all positions above a cut are computed without padding")
        if tokens <= self._near + 1:
            found: tuple[torch.Tensor, Any] = type(attention).forward(attention, hidden_states, **given)
            return found
        turn = given["position_embeddings"]
        query, key, value = (
            as_heads(product(hidden_states), attention)
            for product in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        far_key, far_value = (
            as_heads(rows, attention) for rows in self._module.predict(self._module.streams[self._module.reads[0]])
        )
        query, key, far_key = (rotate(attention, heads, *turn) for heads in (query, key, far_key))
        mixed = attend(query, (key, value), (far_key, far_value), self._near, float(attention.scaling))
        return attention.o_proj(mixed.transpose(1, 2).flatten(2)), None


Keys = tuple[torch.Tensor, torch.Tensor]  # keys and values [B, heads of keys, T, head size]


def attend(query_BHTS: torch.Tensor, own: Keys, far: Keys, near: int, scale: float) -> torch.Tensor:
    """Attention [B, heads, T, head size] over own keys and predicted keys, all rotated."""
    groups = query_BHTS.shape[1] // own[0].shape[1]
    tokens = query_BHTS.shape[2]
    blocks = []
    for begin in range(0, tokens, _BLOCK):
        end = min(begin + _BLOCK, tokens)
        far_S = torch.arange(1, max(1, end - near))
        own_S = torch.arange(max(1, begin - near + 1), end)
        key, value = (
            torch.cat([mine[:, :, :1], there[:, :, 1 : 1 + len(far_S)], mine[:, :, end - len(own_S) : end]], 2)
            for mine, there in zip(own, far, strict=True)
        )
        distance = torch.arange(begin, end)[:, None] - torch.cat([torch.zeros(1), far_S, own_S])
        seen = distance >= near
        seen[:, 1 + len(far_S) :] = (distance >= 0)[:, 1 + len(far_S) :] & ~seen[:, 1 + len(far_S) :]
        seen[:, 0] = True
        query = query_BHTS[:, :, begin:end]
        key, value = (part.to(query.dtype).repeat_interleave(groups, 1) for part in (key, value))
        blocks.append(scaled_dot_product_attention(query, key, value, seen.to(query.device), scale=scale))
    return torch.cat(blocks, 2)
