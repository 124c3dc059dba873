"""The NBL torch model: attention modules replaced by mixers. Verification compares graphs with this model.

    before   x --- norm --- self_attn --- (norm) ---(+ x)---      after   x --- Identity --- mixer ---(+ x)---

No modelling file is forked: the layer's own forward still adds the residual. The norm before attention becomes the
identity, since the mixer acts on the residual stream (tap "residual"). A norm after attention does too. With predicted
KV, a layer's forward runs on few rows (`torch_layers`), or its attention mixes own and predicted KV
(`teacher_forced`). The attention block is as its architecture's record describes it (`architectures`):

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

from nbl_export.methods.base import Mixer, Port
from nbl_export.methods.modules import MixerModule
from nbl_export.methods.predicted_kv.teacher_forced import TeacherForcedAttention
from nbl_export.methods.predicted_kv.torch_layers import PrefillExitLayer, check_attention, check_served
from nbl_export.model.architectures import architecture_of

__all__ = [
    "BESIDE",
    "PassThrough",
    "architecture_of",
    "block_modules",
    "block_output",
    "linearize",
    "multiplier_of",
    "replace_attention",
    "run_from",
    "stored_in",
    "switched",
]

BESIDE = "mixer"  # name, in attention, of a module that does not replace attention


def linearize(model: Any, maps: Mapping[int, Mixer], tap: str = "residual") -> Any:
    """Put mixers into their layers, in place, and return the model.

    A mixer that gives the block's output replaces the layer's attention. With the tap "normed" the layer's norm stays
    before the mixer. A mixer that gives keys and values stands beside it (`predicted_kv.torch_layers`).
    """
    multiplier = multiplier_of(model.config)
    replace_attention(model, {i: mixer.module(multiplier) for i, mixer in maps.items()}, tap)
    return model.eval()


def replace_attention(model: Any, modules: Mapping[int, MixerModule], tap: str) -> None:
    """Put modules into layers for good. They take on attention's dtype, device and cache index."""
    decoder = model.get_decoder()
    places = list(_places(decoder, modules, tap, served=True))
    for index, module in modules.items():
        reference = next(decoder.layers[index].self_attn.parameters())
        module.layer_idx = index
        module.to(dtype=reference.dtype, device=reference.device)
        if Port.OUTPUT not in module.gives:
            setattr(decoder.layers[index].self_attn, BESIDE, module)  # so that the model's weights include it
    _watch(decoder, modules)
    for owner, name, new in places:
        setattr(owner, name, new)


def stored_in(mixer: Mixer) -> str:
    """The name, in a layer, of the module of a mixer that `linearize` put there."""
    return "self_attn" if Port.OUTPUT in mixer.gives else f"self_attn.{BESIDE}"


Place = tuple[Any, str, Any]  # owner, attribute and new value of what the modules of layers change


def _places(decoder: Any, modules: Mapping[int, MixerModule], tap: str, *, served: bool) -> Iterator[Place]:
    """Where the modules of layers enter them.

    Raises:
        NblError: a module gives keys, and the layer's attention makes keys in another way, or a layer above an exit
        layer needs
            rows that do not continue.
    """
    for index, module in modules.items():
        layer = decoder.layers[index]
        if Port.OUTPUT in module.gives:
            yield layer, "self_attn", module
            yield from ((layer, name, nn.Identity()) for name in block_modules(decoder.config, tap))
        else:
            check_attention(layer, decoder.config, index)
            if not served:
                yield layer.self_attn, "forward", TeacherForcedAttention(layer.self_attn, module)
    if served and (found := check_served(modules, len(decoder.layers))) is not None:
        exit_layer, recent_tokens = found
        for index, layer in list(enumerate(decoder.layers))[exit_layer:]:
            yield layer, "forward", PrefillExitLayer(layer, modules[index], recent_tokens)


def _watch(decoder: Any, modules: Mapping[int, MixerModule]) -> list[Any]:
    """Show modules the streams of other layers that they read; returns the handles of the hooks."""

    def shown(module: MixerModule, stream: int) -> Any:
        return lambda _layer, given: module.streams.__setitem__(stream, given[0])

    return [
        decoder.layers[stream].register_forward_pre_hook(shown(module, stream))
        for module in modules.values()
        for stream in module.reads
    ]


@contextlib.contextmanager
def switched(decoder: Any, modules: Mapping[int, MixerModule], tap: str, first: int = 0) -> Iterator[None]:
    """Within: layers of a decoder have these modules; layers below `first`, of which none is read, pass their input on.

    Layers below `first` stay in the list, since decoders look up a layer's mask and rotary embedding by its index.
    Layers above an exit layer compute all positions (`methods.predicted_kv.teacher_forced`).
    """
    layers = decoder.layers
    places = list(_places(decoder, modules, tap, served=False))
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
