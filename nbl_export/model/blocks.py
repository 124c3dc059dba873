"""The attention block of a torch decoder, as its architecture's record describes the block (`architectures`).

    x ---+--- norm before --- self_attn --- norm after --- * multiplier ---+--- x + y
         `-----------------------------------------------------------------'

No other module knows the attributes of a decoder layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nbl_export.model.architectures import ARCHITECTURES, LINEARIZED, Architecture

__all__ = ["PassThrough", "architecture_of", "block_modules", "block_output", "multiplier_of", "run_from"]


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
