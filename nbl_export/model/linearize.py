"""The NBL torch model: attention modules replaced by mixers. Verification compares graphs with this model.

    before   x --- norm --- self_attn --- (norm) ---(+ x)---      after   x --- Identity --- mixer ---(+ x)---

No modelling file is forked: the layer's own forward still adds the residual. The norm before attention becomes the
identity, since the mixer acts on the residual stream (tap "residual"). A norm after attention does too. The attention
block is as its architecture's record describes it (`architectures`):

    x ---+--- norm before --- self_attn --- norm after --- * multiplier ---+--- x + y
         `-----------------------------------------------------------------'

No other module knows the attributes of a decoder layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from nbl_export.mixers.base import Mixer
from nbl_export.model.architecture_record import Architecture
from nbl_export.model.architectures import ARCHITECTURES, LINEARIZED

__all__ = [
    "PassThrough",
    "architecture_of",
    "block_modules",
    "block_output",
    "linearize",
    "multiplier_of",
    "replace_attention",
    "replaced",
    "run_from",
    "switched",
]


def linearize(model: Any, maps: Mapping[int, Mixer], tap: str = "residual") -> Any:
    """Replace the attention of the layers that have a mixer, in place, and return the model.

    With the tap "normed" the layer's norm stays before the mixer.
    """
    multiplier = multiplier_of(model.config)
    replace_attention(model, {i: mixer.module(multiplier) for i, mixer in maps.items()}, tap)
    return model.eval()


def replace_attention(model: Any, modules: Mapping[int, nn.Module], tap: str) -> None:
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
def replaced(model: Any, maps: Mapping[int, Mixer], tap: str) -> Iterator[None]:
    """Within: a causal LM has mixers in place of attention; it is as before afterwards."""
    modules = {i: mixer.module(multiplier_of(model.config)).to(model.device) for i, mixer in maps.items()}
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


class PassThrough(nn.Module):
    """Replaces a decoder layer whose output is already computed."""

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return hidden_states


def architecture_of(config: Any) -> Architecture:
    """The record of a transformers configuration, also of a linearized model's."""
    return ARCHITECTURES[config.model_type.removeprefix(LINEARIZED)]


def multiplier_of(config: Any) -> float:
    """Factor of a block's output before the addition to the residual stream."""
    name = architecture_of(config).multiplier
    return 1.0 if name is None else float(getattr(config, name))


def block_output(layer: Any, config: Any) -> tuple[nn.Module, float]:
    """The last module of the block, and the factor of its output: y = multiplier * out."""
    name = architecture_of(config).norm_after or "self_attn"
    return getattr(layer, name), multiplier_of(config)


def block_modules(config: Any, tap: str) -> tuple[str, ...]:
    """Names of the norms that a layer's map replaces along with attention."""
    record = architecture_of(config)
    before = (record.norm_before,) if tap == "residual" else ()
    return tuple(name for name in (*before, record.norm_after) if name is not None)


def run_from(decoder: Any, entering_BTD: torch.Tensor) -> torch.Tensor:
    """Last hidden states (after the final norm) of a decoder, from the hidden states that enter its first layer."""
    with _entered(decoder):
        last: torch.Tensor = decoder(inputs_embeds=entering_BTD, use_cache=False).last_hidden_state
    return last


@contextlib.contextmanager
def _entered(decoder: Any) -> Iterator[None]:
    """Within: inputs_embeds enter the decoder's first layer without the entry multiplier."""
    name = architecture_of(decoder.config).entry_multiplier
    if name is None:
        yield
        return
    multiplier = getattr(decoder, name)
    setattr(decoder, name, 1.0)
    try:
        yield
    finally:
        setattr(decoder, name, multiplier)
