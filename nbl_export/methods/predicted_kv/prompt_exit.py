"""The exit layer of a model: where a prompt stops, by the maps above it
(`methods.predicted_kv.maps`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nbl_export.errors import NblError
from nbl_export.methods.base import Mixer
from nbl_export.methods.predicted_kv.maps import PredictedKV

__all__ = ["PromptExit", "candidate_exits", "prompt_exit_of"]

_MOST = 16  # candidate exit layers: the lowest is at half of the layers, the highest leaves an eighth above it


@dataclass(frozen=True)
class PromptExit:
    """Where a prompt stops.

    Attributes:
        layer: its input is the stream that the maps read.
        recent_tokens: W, the tokens at the end of a step that continue, beside the first one.
        maps: by layer, of the layers whose skipped tokens' keys are predicted.
    """

    layer: int
    recent_tokens: int
    maps: Mapping[int, PredictedKV]


def prompt_exit_of(mixers: Mapping[int, Mixer]) -> PromptExit | None:
    """The exit layer of a model's mixers; None if none of them predicts KV.

    Raises:
        NblError: they have several exit layers.
    """
    maps = {layer: mixer for layer, mixer in sorted(mixers.items()) if isinstance(mixer, PredictedKV)}
    found = {(mixer.exit_layer, mixer.recent_tokens) for mixer in maps.values()}
    if len(found) > 1:
        raise NblError(f"the maps have several exit layers or numbers of recent tokens: {sorted(found)}")
    return PromptExit(*found.pop(), maps) if found else None


def candidate_exits(num_layers: int) -> tuple[int, ...]:
    """The exit layers that are calibrated and judged, ascending."""
    low = max(1, num_layers // 2)
    high = max(1, num_layers - max(1, num_layers // 8))
    step = max(1, math.ceil((high - low + 1) / _MOST))
    return tuple(range(low, high + 1, step)) if num_layers > 1 else ()
