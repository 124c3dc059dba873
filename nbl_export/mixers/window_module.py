"""The torch module of a window (`mixers.window`), in place of a self-attention module of transformers.

The cache of transformers holds keys, not rotated, and values of all tokens. So cropping and reordering a cache treat
these as they treat those of attention.
"""

from __future__ import annotations

from typing import Any

import torch

from nbl_export.mixers.modules import MixerModule
from nbl_export.mixers.windowed import WindowShape, rotary_tables, swapped

__all__ = ["WindowModule"]

_ROWS = 256  # queries whose scores are held at once


class WindowModule(MixerModule):
    """Attention over the last W tokens and the first one.

    Args:
        window: a `mixers.window.Window`, whose matrices, bias and norm give shapes alone; they are loaded later.
    """

    qkv: torch.Tensor
    bias: torch.Tensor
    output: torch.Tensor
    norm: torch.Tensor

    def __init__(self, window: Any, multiplier: float = 1.0) -> None:
        super().__init__(multiplier)
        self.shape: WindowShape = window.shape
        self._epsilon = window.epsilon
        self._turned: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        self._has_norm, self._frequencies = window.norm is not None, window.frequencies
        parts = {"qkv": window.qkv, "bias": window.bias, "output": window.output, "norm": window.norm}
        for name, array in parts.items():
            if array is not None:
                setattr(self, name, torch.nn.Parameter(torch.empty(array.shape), requires_grad=False))
        self._swap = swapped(len(window.frequencies), self.shape.head_size).tolist()

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        shape, count = self.shape, hidden_states.shape[1]
        x_BTD = self._normed(hidden_states) if self._has_norm else hidden_states
        qkv = torch.nn.functional.linear(x_BTD, self.qkv, self.bias)
        parts = qkv.split([shape.query_width, shape.key_width, shape.key_width], 2)
        q, k, v = (part.unflatten(2, (-1, shape.head_size)).transpose(1, 2) for part in parts)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None and self.layer_idx is not None:
            k, v = cache.update(k, v, self.layer_idx)
        valid_BS = _valid(kwargs.get("attention_mask"), k, count)
        place_BS = valid_BS.long().cumsum(1) - 1
        out = self._attend(q * shape.scale, k, v, place_BS, valid_BS)
        found = torch.nn.functional.linear(out, self.output)
        return (found if self.multiplier == 1.0 else found / self.multiplier), None

    def _normed(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x = x_BTD.float()
        return self.norm * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._epsilon)).to(x_BTD.dtype)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, place_BS: torch.Tensor, valid_BS: torch.Tensor
    ) -> torch.Tensor:
        """What heads make of queries [B, H, T, d] and of keys and values [B, G, S, d] of all tokens up to the last."""
        tokens, groups = self.shape.tokens, self.shape.heads // self.shape.kv_heads
        count, length = q.shape[2], k.shape[2]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        start = (valid_BS & (place_BS == 0)).long().argmax(1)
        which = torch.arange(len(k), device=k.device)
        first_k, first_v = k[which, :, start][:, :, None], v[which, :, start][:, :, None]
        far = (q @ self._rotated(first_k, torch.tensor([[-tokens]])).mT).squeeze(3)
        keys = self._rotated(k, place_BS)
        outs = []
        for rows in torch.arange(count, device=k.device).split(_ROWS):
            now = rows + length - count
            back = place_BS[:, now, None] - place_BS[:, None]
            seen = (back >= 0) & (back < tokens) & valid_BS[:, None]
            seen |= (back == 0) & ~valid_BS[:, now, None]  # a row of padding reads itself
            near = seen.any(0).any(0).nonzero()
            low, high = int(near[0]), int(near[-1]) + 1
            scores = self._rotated(q[:, :, rows], place_BS[:, now]) @ keys[:, :, low:high].mT
            scores = scores.masked_fill(~seen[:, None, :, low:high], -torch.inf)
            gone = (place_BS[:, now] >= tokens)[:, None, :]
            last = far[:, :, rows].masked_fill(~gone, -torch.inf)
            share = torch.cat([scores, last[..., None]], 3).float().softmax(3).to(v.dtype)
            outs.append(share[..., :-1] @ v[:, :, low:high] + share[..., -1:] * first_v)
        return torch.cat(outs, 2).transpose(1, 2).flatten(2)

    def _rotated(self, value_BHTd: torch.Tensor, place_BT: torch.Tensor) -> torch.Tensor:
        """Heads rotated by positions."""
        lowest, highest = int(place_BT.min()), int(place_BT.max())
        key = (value_BHTd.device, value_BHTd.dtype, lowest, highest)
        if key not in self._turned:
            places = torch.arange(lowest, highest + 1).numpy()
            found = rotary_tables(places, self._frequencies, self.shape.head_size)
            self._turned = {key: tuple(torch.from_numpy(t).to(value_BHTd) for t in found)}
        cosine, sine = (table[place_BT - lowest][:, None] for table in self._turned[key])
        return value_BHTd * cosine + value_BHTd[..., self._swap] * sine


def _valid(mask: torch.Tensor | None, k_BGSd: torch.Tensor, count: int) -> torch.Tensor:
    """Which of the tokens [B, S] up to the last one are no padding, from transformers' mask [B, 1, T, S].

    A token of padding does not read itself. A token of the steps before is one that a token of this step reads.
    """
    length = k_BGSd.shape[2]
    if mask is None:
        return torch.ones(len(k_BGSd), length, dtype=torch.bool, device=k_BGSd.device)
    read = mask[:, 0, :, :length] if mask.dtype == torch.bool else mask[:, 0, :, :length] == 0
    own_BT = read[..., length - count :].diagonal(0, 1, 2)
    before = (read[..., : length - count] & own_BT[..., None]).any(1)
    return torch.cat([before, own_BT], 1)
