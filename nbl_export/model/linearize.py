"""The NBL torch model: attention modules replaced by affine maps. Verification compares graphs with this model.

    before   x --- norm --- self_attn --- (norm) ---(+ x)---      after   x --- Identity --- Linear ---(+ x)---

No modelling file is forked: the layer's own forward still adds the residual. The norm before attention becomes the
identity, since the map acts on the residual stream (tap "residual"). A norm after attention (`blocks`) does too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from nbl_export.model.blocks import PassThrough, block_modules, multiplier_of
from nbl_export.records.plan import AffineMap

__all__ = ["AffineAttention", "linearize", "replace_attention", "replaced", "switched"]


class AffineAttention(nn.Module):
    """Replaces a self-attention module of transformers: (hidden_states, ...) -> (output, None).

    Args:
        multiplier: the layer's factor of attention's output. The map includes the factor, so its output is divided.
    """

    def __init__(self, affine: AffineMap, multiplier: float = 1.0) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.layer_idx: int | None = None
        out_features, in_features = affine.weight.shape
        self.linear = nn.Linear(in_features, out_features)
        with torch.no_grad():
            self.linear.weight.copy_(torch.from_numpy(affine.weight))
            self.linear.bias.copy_(torch.from_numpy(affine.bias))

    @classmethod
    def blank(cls, size: int, multiplier: float = 1.0) -> AffineAttention:
        """A module whose map [size, size] is loaded later."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.multiplier = multiplier
        made.layer_idx = None
        made.linear = nn.Linear(size, size)
        return made

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        self.count(hidden_states, kwargs.get("cache", kwargs.get("past_key_values")))
        out = self.linear(hidden_states)
        return (out if self.multiplier == 1.0 else out / self.multiplier), None

    def count(self, hidden_BTD: torch.Tensor, cache: Any) -> None:
        """Tell the cache that T more tokens have been seen, by one number a token.

        transformers reads the past length and the width of masks from the cache of the first layer of each kind. A
        cache without numbers counts as empty.
        """
        if cache is not None and self.layer_idx is not None:
            seen = hidden_BTD.new_zeros(hidden_BTD.shape[0], 1, hidden_BTD.shape[1], 1)
            cache.update(seen, seen, self.layer_idx)


def linearize(model: Any, maps: Mapping[int, AffineMap], tap: str = "residual") -> Any:
    """Replace the attention of the mapped layers, in place, and return the model.

    With the tap "normed" the layer's norm stays before the map.
    """
    multiplier = multiplier_of(model.config)
    replace_attention(model, {i: AffineAttention(affine, multiplier) for i, affine in maps.items()}, tap)
    return model.eval()


def replace_attention(model: Any, modules: Mapping[int, AffineAttention], tap: str) -> None:
    """Replace the layers' attention by modules, which take on attention's dtype, device and cache index."""
    layers, norms = model.get_decoder().layers, block_modules(model.config, tap)
    for index, module in modules.items():
        layer = layers[index]
        reference = next(layer.self_attn.parameters())
        module.layer_idx = index
        layer.self_attn = module.to(dtype=reference.dtype, device=reference.device)
        for name in norms:
            setattr(layer, name, nn.Identity())


@contextlib.contextmanager
def replaced(model: Any, maps: Mapping[int, AffineMap], tap: str) -> Iterator[None]:
    """Within: a causal LM has maps in place of attention; it is as before afterwards."""
    modules = {i: AffineAttention(affine, multiplier_of(model.config)) for i, affine in maps.items()}
    for index, module in modules.items():
        module.layer_idx = index
    with switched(model.get_decoder(), modules, tap):
        yield


@contextlib.contextmanager
def switched(decoder: Any, modules: Mapping[int, nn.Module], tap: str, first: int = 0) -> Iterator[None]:
    """Within: layers of a decoder compute these modules instead of attention; layers below `first` pass their input on.

    Layers below `first` stay in the list, since decoders look up a layer's mask and rotary embedding by its index.
    """
    layers = decoder.layers
    norms = block_modules(decoder.config, tap)
    kept = {i: {name: getattr(layers[i], name) for name in ("self_attn", *norms)} for i in modules}
    try:
        for i, module in modules.items():
            layers[i].self_attn = module
            for name in norms:
                setattr(layers[i], name, nn.Identity())
        decoder.layers = nn.ModuleList([*(PassThrough() for _ in range(first)), *layers[first:]])
        yield
    finally:
        decoder.layers = layers
        for i, before in kept.items():
            for name, was in before.items():
                setattr(layers[i], name, was)
