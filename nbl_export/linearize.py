"""The NBL torch model: attention modules replaced by affine maps. The truth that the graph is held to.

    before   x --- input_layernorm --- self_attn ---(+ x)---      after   x --- Identity --- Linear ---(+ x)---

No modelling file is forked: the layer's own forward still adds the residual. The norm becomes the identity,
since the map acts on the residual stream (tap "residual").
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from nbl_export.records import AffineMap

__all__ = ["AffineAttention", "linearize", "replace_attention", "switched"]


class AffineAttention(nn.Module):
    """Stands in for a self-attention module of transformers: (hidden_states, ...) -> (output, None)."""

    def __init__(self, affine: AffineMap) -> None:
        super().__init__()
        out_features, in_features = affine.weight.shape
        self.linear = nn.Linear(in_features, out_features)
        with torch.no_grad():
            self.linear.weight.copy_(torch.from_numpy(affine.weight))
            self.linear.bias.copy_(torch.from_numpy(affine.bias))

    @classmethod
    def blank(cls, size: int) -> AffineAttention:
        """One whose map [size, size] is still to be loaded."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.linear = nn.Linear(size, size)
        return made

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> tuple[torch.Tensor, None]:
        return self.linear(hidden_states), None


def linearize(model: Any, maps: Mapping[int, AffineMap], tap: str = "residual") -> Any:
    """Replace the attention of the mapped layers, in place, and return the model.

    With the tap "normed" the layer's norm stays in front of the map.
    """
    replace_attention(model, {i: AffineAttention(affine) for i, affine in maps.items()}, tap)
    return model.eval()


def replace_attention(model: Any, modules: Mapping[int, nn.Module], tap: str) -> None:
    """Put modules in the place of the attention of layers; they take on its dtype and device.

    The cache indices of the kept layers become dense: transformers reads the past length from cache 0, which
    would stay empty if layer 0 were replaced.
    """
    kept = 0
    for index, layer in enumerate(model.get_decoder().layers):
        if index in modules:
            reference = next(layer.self_attn.parameters())
            layer.self_attn = modules[index].to(dtype=reference.dtype, device=reference.device)
            if tap == "residual":
                layer.input_layernorm = nn.Identity()
        else:
            layer.self_attn.layer_idx = kept
            kept += 1


@contextlib.contextmanager
def switched(decoder: Any, modules: Mapping[int, nn.Module], tap: str, first: int = 0) -> Iterator[None]:
    """Within: layers of a decoder compute these modules instead of attention; layers below `first` are left out."""
    layers = decoder.layers
    kept = {i: (layers[i].self_attn, layers[i].input_layernorm) for i in modules}
    try:
        for i, module in modules.items():
            layers[i].self_attn = module
            if tap == "residual":
                layers[i].input_layernorm = nn.Identity()
        decoder.layers = layers[first:]
        yield
    finally:
        decoder.layers = layers
        for i, (attention, norm) in kept.items():
            layers[i].self_attn, layers[i].input_layernorm = attention, norm
