"""The NBL torch model: attention modules replaced by mixers. Verification compares graphs with this model.

    before   x --- norm --- self_attn --- (norm) ---(+ x)---      after   x --- Identity --- mixer ---(+ x)---

No modelling file is forked: the layer's own forward still adds the residual. The norm before attention becomes the
identity, since the mixer acts on the residual stream (tap "residual"). A norm after attention does too. A mixer that
holds the cache changes other places of its layer (`MixerModule.places`). The attention block is as its architecture's
record describes it (`architectures`):

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

from nbl_export.methods.modules import MixerModule, Place
from nbl_export.model.architectures import architecture_of

__all__ = [
    "BESIDE",
    "PassThrough",
    "applied",
    "architecture_of",
    "block_output",
    "linearize",
    "multiplier_of",
    "replace_attention",
    "run_from",
    "stored_in",
    "switched",
]

BESIDE = "mixer"  # name, in attention, of a module that does not replace attention


def linearize(model: Any, maps: Mapping[int, Any], tap: str = "residual") -> Any:
    """Put mixers into their layers, in place and for good, and return the model; see `applied`."""
    multiplier = multiplier_of(model.config)
    replace_attention(model, {i: mixer.module(multiplier) for i, mixer in maps.items()}, tap)
    return model.eval()


@contextlib.contextmanager
def applied(model: Any, maps: Mapping[int, Any], tap: str = "residual") -> Iterator[None]:
    """Within: a causal LM of transformers computes what an engine will serve with these mixers.

    A mixer that gives the block's output replaces the layer's attention. With the tap "normed" the layer's norm stays
    before the mixer. A mixer that holds the cache stands beside attention.
    """
    multiplier = multiplier_of(model.config)
    modules = {i: mixer.module(multiplier).eval() for i, mixer in maps.items()}
    decoder = model.get_decoder()
    for index, module in modules.items():
        _fit_in(decoder.layers[index], index, module)
    with _switched(decoder, modules, tap, served=True):
        yield


def _fit_in(layer: Any, index: int, module: MixerModule) -> None:
    reference = next(layer.self_attn.parameters())
    module.layer_idx = index
    module.to(dtype=reference.dtype, device=reference.device)


def replace_attention(model: Any, modules: Mapping[int, MixerModule], tap: str) -> None:
    """Put modules into layers for good. They take on attention's dtype, device and cache index."""
    decoder = model.get_decoder()
    places = _places(decoder, modules, tap, served=True)
    for index, module in modules.items():
        _fit_in(decoder.layers[index], index, module)
        if module.beside:
            setattr(decoder.layers[index].self_attn, BESIDE, module)  # so that the model's weights include it
    _watch(decoder, modules)
    for owner, name, new in places:
        setattr(owner, name, new)


def stored_in(mixer: Any) -> str:
    """The name, in a layer, of the module of a mixer that `linearize` put there."""
    return f"self_attn.{BESIDE}" if mixer.holds_cache else "self_attn"


def _places(decoder: Any, modules: Mapping[int, MixerModule], tap: str, *, served: bool) -> list[Place]:
    """What modules of one method change in a decoder.

    Raises:
        NblError: a layer cannot have its module.
    """
    first = next(iter(modules.values()), None)
    return [] if first is None else list(first.places(decoder, modules, tap, served=served))


def _watch(decoder: Any, modules: Mapping[int, MixerModule]) -> list[Any]:
    """Show modules the streams of other layers that they read; returns the handles of the hooks."""

    def shown(module: MixerModule, stream: int) -> Any:
        return lambda _layer, given: module.streams.__setitem__(stream, given[0])

    return [
        decoder.layers[stream].register_forward_pre_hook(shown(module, stream))
        for module in modules.values()
        for stream in module.reads
    ]


def switched(
    decoder: Any, modules: Mapping[int, MixerModule], tap: str, first: int = 0
) -> contextlib.AbstractContextManager[None]:
    """Within: layers of a decoder have these modules; layers below `first`, of which none is read, pass their input on.

    Layers below `first` stay in the list, since decoders look up a layer's mask and rotary embedding by its index.
    Every position is computed.
    """
    return _switched(decoder, modules, tap, first, served=False)


@contextlib.contextmanager
def _switched(
    decoder: Any, modules: Mapping[int, MixerModule], tap: str, first: int = 0, *, served: bool
) -> Iterator[None]:
    layers = decoder.layers
    places = _places(decoder, modules, tap, served=served)
    before = [vars(owner).get(name, owner._modules.get(name)) for owner, name, _ in places]
    handles = _watch(decoder, modules)
    try:
        for owner, name, new in places:
            setattr(owner, name, new)
        decoder.layers = nn.ModuleList([*(PassThrough() for _ in range(first)), *layers[first:]])
        yield
    finally:
        decoder.layers = layers
        for (owner, name, _), was in zip(places, before, strict=True):
            if was is None:  # the forward of its class
                delattr(owner, name)
            else:
                setattr(owner, name, was)
        for handle in handles:
            handle.remove()


class PassThrough(nn.Module):
    """Replaces a decoder layer whose output is already computed."""

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return hidden_states


def multiplier_of(config: Any) -> float:
    """Factor of a block's output before the addition to the residual stream."""
    name = architecture_of(config).multiplier
    return 1.0 if name is None else float(getattr(config, name))


def block_output(layer: Any, config: Any) -> tuple[nn.Module, float]:
    """The module whose output is what attention adds in the original, and its factor: value = multiplier * output."""
    return getattr(layer, architecture_of(config).norm_after or "self_attn"), multiplier_of(config)


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
