"""The torch module of predicted keys and values (`mixers.predicted`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nbl_export.mixers.base import Port
from nbl_export.mixers.modules import MixerModule

__all__ = ["PredictedModule", "features"]


class PredictedModule(MixerModule):
    """Keys and values of all tokens of a step, from the stream at the cut; see `model.cut` for their use.

    Args:
        like: a mixer of this shape and cut; its numbers are not read.
    """

    gives = (Port.KEYS, Port.VALUES)

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.cut = like.cut
        self.near = like.near
        self.epsilon = like.epsilon
        self.reads = (like.cut,)
        self.linear = nn.Linear(like.weight.shape[1], len(like.weight))

    def predict(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, T, K] each, before rotary embedding, from the stream at the cut."""
        keys, values = self.linear(features(x_BTD, self.epsilon)).chunk(2, -1)
        return keys, values


def features(x_BTD: torch.Tensor, epsilon: float) -> torch.Tensor:
    """What a map reads, [B, T, 2 D]: rows under the RMS norm without a weight, and beside each the row before it.

    The first token stands before itself.
    """
    x = x_BTD.float()
    x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)).to(x_BTD.dtype)
    return torch.cat([x, torch.cat([x[:, :1], x[:, :-1]], 1)], 2)
