"""The torch module of predicted KV (`methods.predicted_kv.maps`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from nbl_export.methods.modules import MixerModule, Place

__all__ = ["PredictedKVModule", "features"]


class PredictedKVModule(MixerModule):
    """Keys and values of all tokens of a step, from the stream at the exit layer; see
    `methods.predicted_kv.torch_layers` for their use.

    Args:
        like: a mixer of this shape and exit layer; its numbers are not read.
    """

    beside = True

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.exit_layer = like.exit_layer
        self.recent_tokens = like.recent_tokens
        self.epsilon = like.epsilon
        self.reads = (like.exit_layer,)
        self.linear = nn.Linear(like.weight.shape[1], len(like.weight))

    @staticmethod
    def places(decoder: Any, modules: Mapping[int, Any], tap: str, *, served: bool) -> Iterator[Place]:
        from nbl_export.methods.predicted_kv.products import KeyValueProducts
        from nbl_export.methods.predicted_kv.teacher_forced import TeacherForcedAttention
        from nbl_export.methods.predicted_kv.torch_layers import PrefillExitLayer, check_served

        for index, module in modules.items():
            layer = decoder.layers[index]
            products = KeyValueProducts.of(layer.self_attn, decoder.config, index)
            if served:
                yield layer, "forward", PrefillExitLayer(layer, products, module, module.recent_tokens)
            else:
                yield layer.self_attn, "forward", TeacherForcedAttention(layer.self_attn, products, module)
        if served:
            check_served(modules, len(decoder.layers))

    def predict(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, T, K] each, before rotary embedding, from the stream at the exit layer."""
        keys, values = self.linear(features(x_BTD, self.epsilon)).chunk(2, -1)
        return keys, values


def features(x_BTD: torch.Tensor, epsilon: float) -> torch.Tensor:
    """What a map reads, [B, T, 2 D]: rows under the RMS norm without a weight, and beside each the row before it.

    The first token stands before itself.
    """
    x = x_BTD.float()
    x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)).to(x_BTD.dtype)
    return torch.cat([x, torch.cat([x[:, :1], x[:, :-1]], 1)], 2)
