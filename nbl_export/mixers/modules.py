"""Torch modules of mixers, in place of a self-attention module of transformers: (hidden_states, ...) -> (output, None).

A module tells transformers' cache of each token, by one number: transformers reads the past length and the width of
masks from the cache of the first layer of each kind. A mixer with a state keeps its input rows in the same cache, as
its values. So cropping and reordering a cache treat these rows as they treat keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nbl_export.mixers.base import StateSpec

__all__ = ["MixerModule", "NothingModule", "Wrapped"]


class MixerModule(nn.Module):
    """Base of the modules; a subclass gives `mix`.

    Args:
        multiplier: the layer's factor of attention's output. A mixer includes it, so the module's output is divided.

    Attributes:
        state: what the mixer remembers.
        layer_idx: index of the layer in the cache; None to use no cache.
    """

    state: StateSpec | None = None

    def __init__(self, multiplier: float = 1.0) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.layer_idx: int | None = None

    def mix(self, x_BTD: torch.Tensor, past_BSD: torch.Tensor | None) -> torch.Tensor:
        """The mixer's output; `past_BSD` holds the rows of its state, None without a state."""
        raise NotImplementedError

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        if self.state is not None:
            hidden_states = _without_padding(hidden_states, kwargs.get("attention_mask"))
        past = self.remember(hidden_states, kwargs.get("cache", kwargs.get("past_key_values")))
        out = self.mix(hidden_states, past)
        return (out if self.multiplier == 1.0 else out / self.multiplier), None

    def remember(self, x_BTD: torch.Tensor, cache: Any) -> torch.Tensor | None:
        """Put T more tokens into the cache, and return the state before them; None for a mixer without a state."""
        rows = None
        if cache is not None and self.layer_idx is not None:
            seen = x_BTD.new_zeros(x_BTD.shape[0], 1, x_BTD.shape[1], 1)
            rows = cache.update(seen, seen if self.state is None else x_BTD[:, None], self.layer_idx)[1]
        if self.state is None:
            return None
        tokens = self.state.tokens
        blank = x_BTD.new_zeros(x_BTD.shape[0], tokens, self.state.width)
        if rows is None:
            return blank
        return torch.cat([blank, rows[:, 0, : rows.shape[2] - x_BTD.shape[1]]], 1)[:, -tokens:]


def _without_padding(x_BTD: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x with rows of zeros for tokens of padding: those that a mask [B, 1, T, S] keeps from reading themselves."""
    if mask is None:
        return x_BTD
    own_BT = mask[:, 0].diagonal(mask.shape[-1] - x_BTD.shape[1], 1, 2)
    valid_BT = own_BT if own_BT.dtype == torch.bool else own_BT == 0
    return x_BTD * valid_BT[..., None]


class Wrapped(MixerModule):
    """What its module `linear` makes of x [B, T, D]: a linear layer, or a mixer in training (`base.TrainedMixer`)."""

    def __init__(self, linear: nn.Module, multiplier: float = 1.0) -> None:
        super().__init__(multiplier)
        self.linear: Any = linear

    def mix(self, x_BTD: torch.Tensor, past_BSD: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = self.linear(x_BTD)
        return out


class NothingModule(MixerModule):
    """Zeros."""

    def mix(self, x_BTD: torch.Tensor, past_BSD: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros_like(x_BTD)
