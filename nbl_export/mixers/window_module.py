"""The torch modules of a window (`mixers.window`): one in place of self-attention of transformers, and one in training.

The cache of transformers holds keys, not rotated, and values of all tokens. So cropping and reordering a cache treat
these as they treat those of attention.

A window in training has low-rank deltas on its own products, with units as `mixers.modules` says:

    x -- norm -- qkv + delta -- heads -- output + delta --
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from nbl_export.mixers.modules import MixerModule, TrainedLinear
from nbl_export.mixers.windowed import WindowShape, rotary_tables, swapped

__all__ = ["TrainedWindow", "WindowModule"]

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
        self.heads, self._epsilon = _Heads(window), window.epsilon
        self._has_norm = window.norm is not None
        parts = {"qkv": window.qkv, "bias": window.bias, "output": window.output, "norm": window.norm}
        for name, array in parts.items():
            if array is not None:
                setattr(self, name, nn.Parameter(torch.empty(array.shape), requires_grad=False))

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        x_BTD = _normed(hidden_states, self.norm, self._epsilon) if self._has_norm else hidden_states
        q, k, v = self.heads.split(nn.functional.linear(x_BTD, self.qkv, self.bias))
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None and self.layer_idx is not None:
            k, v = cache.update(k, v, self.layer_idx)
        valid_BS = _valid(kwargs.get("attention_mask"), k, q.shape[2])
        found = nn.functional.linear(self.heads.attend(q, k, v, valid_BS), self.output)
        return (found if self.multiplier == 1.0 else found / self.multiplier), None


class TrainedWindow(nn.Module):
    """A window whose products are trained on texts without padding, each read at once: x [B, T, D] -> [B, T, D]."""

    norm: torch.Tensor | None

    def __init__(self, window: Any, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self._window, self._heads = window, _Heads(window)
        self.register_buffer("norm", None if window.norm is None else torch.from_numpy(window.norm))
        self.qkv = TrainedLinear(_linear(window.qkv, window.bias), rank, generator)
        self.output = TrainedLinear(_linear(window.output, np.zeros(window.size, np.float32)), rank, generator)

    @property
    def _parts(self) -> dict[str, TrainedLinear]:
        return {"qkv": self.qkv, "output": self.output}

    @property
    def rows(self) -> Mapping[str, torch.Tensor] | None:
        """As `TrainedLinear.rows`, for both products."""
        if self.qkv.rows is None or self.output.rows is None:
            return None
        return {f"{p}.{name}": rows for p, part in self._parts.items() for name, rows in (part.rows or {}).items()}

    @rows.setter
    def rows(self, rows: Mapping[str, torch.Tensor] | None) -> None:
        for name, part in self._parts.items():
            part.rows = None if rows is None else _within(name, rows)

    def values(self, whole: bool) -> dict[str, torch.Tensor]:
        """The trained tensors; with `whole`, the matrices that they make, alone."""
        return {f"{p}.{name}": value for p, part in self._parts.items() for name, value in part.values(whole).items()}

    def aim(self, gradients: Mapping[str, torch.Tensor]) -> None:
        for name, part in self._parts.items():
            part.aim(_within(name, gradients))

    @torch.no_grad()
    def measure(self, x_BTD: torch.Tensor) -> None:
        x_BTD = self._normed(x_BTD)
        self.qkv.measure(x_BTD)
        self.output.measure(self._seen(self.qkv(x_BTD)))

    def tensors(self) -> dict[str, np.ndarray]:
        """The window's tensors as trained so far."""
        qkv, output = self.qkv.tensors(), self.output.tensors()
        return {**self._window.tensors(), "qkv": qkv["weight"], "bias": qkv["bias"], "output": output["weight"]}

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.output(self._seen(self.qkv(self._normed(x_BTD))))
        return out

    def _normed(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD if self.norm is None else _normed(x_BTD, self.norm, self._window.epsilon)

    def _seen(self, qkv_BTE: torch.Tensor) -> torch.Tensor:
        valid_BT = torch.ones(qkv_BTE.shape[:2], dtype=torch.bool, device=qkv_BTE.device)
        return self._heads.attend(*self._heads.split(qkv_BTE), valid_BT)


def _linear(weight: np.ndarray, bias: np.ndarray) -> nn.Linear:
    made = nn.Linear(*reversed(weight.shape), device="meta")
    made.weight, made.bias = (nn.Parameter(torch.from_numpy(array), requires_grad=False) for array in (weight, bias))
    return made


def _within(name: str, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}


def _normed(x_BTD: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    x = x_BTD.float()
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)).to(x_BTD.dtype)


class _Heads:
    """What the heads of a window make of queries, keys and values; it has no parameters."""

    def __init__(self, window: Any) -> None:
        self.shape: WindowShape = window.shape
        self._frequencies = window.frequencies
        self._turned: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        self._swap = swapped(len(window.frequencies), self.shape.head_size).tolist()

    def split(self, qkv_BTE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scaled queries [B, H, T, d], keys and values [B, G, T, d]."""
        shape = self.shape
        parts = qkv_BTE.split([shape.query_width, shape.key_width, shape.key_width], 2)
        q, k, v = (part.unflatten(2, (-1, shape.head_size)).transpose(1, 2) for part in parts)
        return q * shape.scale, k, v

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid_BS: torch.Tensor) -> torch.Tensor:
        """What queries [B, H, T, d] read of keys and values [B, G, S, d] of all tokens up to the last: [B, T, H d]."""
        tokens, groups = self.shape.tokens, self.shape.heads // self.shape.kv_heads
        count, length, place_BS = q.shape[2], k.shape[2], valid_BS.long().cumsum(1) - 1
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        start = (valid_BS & (place_BS == 0)).long().argmax(1)
        which = torch.arange(len(k), device=k.device)
        first_k, first_v = k[which, :, start][:, :, None], v[which, :, start][:, :, None]
        far = (q @ self._rotated(first_k, torch.tensor([[-tokens]], device=q.device)).mT).squeeze(3)
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


def _valid(mask: torch.Tensor | None, key_BGSd: torch.Tensor, count: int) -> torch.Tensor:
    """Which of the tokens [B, S] up to the last one are no padding, from transformers' mask [B, 1, T, S].

    A token of padding does not read itself. A token of the steps before is one that a token of this step reads.
    """
    batch, length = len(key_BGSd), key_BGSd.shape[2]
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=key_BGSd.device)
    read = mask[:, 0, :, :length] if mask.dtype == torch.bool else mask[:, 0, :, :length] == 0
    own_BT = read[..., length - count :].diagonal(0, 1, 2)
    before = (read[..., : length - count] & own_BT[..., None]).any(1)
    return torch.cat([before, own_BT], 1)
