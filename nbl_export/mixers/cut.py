"""The cut of a model: where a prompt stops, by the maps that predict keys above it (`mixers.predicted`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nbl_export.errors import NblError
from nbl_export.mixers.base import Mixer
from nbl_export.mixers.predicted import Predicted

__all__ = ["Cut", "candidate_cuts", "cut_of"]

_MOST = 16  # candidate cuts: the lowest is at half of the layers, the highest leaves an eighth above it


@dataclass(frozen=True)
class Cut:
    """Where a prompt stops.

    Attributes:
        layer: its input is the stream that the maps read.
        near: W, the tokens at the end of a step that climb, beside the first one.
        maps: by layer, of the layers whose far keys are predicted.
    """

    layer: int
    near: int
    maps: Mapping[int, Predicted]


def cut_of(mixers: Mapping[int, Mixer]) -> Cut | None:
    """The cut of a model's mixers; None if none of them predicts keys.

    Raises:
        NblError: they have several cuts.
    """
    maps = {layer: mixer for layer, mixer in sorted(mixers.items()) if isinstance(mixer, Predicted)}
    found = {(mixer.cut, mixer.near) for mixer in maps.values()}
    if len(found) > 1:
        raise NblError(f"the maps have several cuts or numbers of near tokens: {sorted(found)}")
    return Cut(*found.pop(), maps) if found else None


def candidate_cuts(num_layers: int) -> tuple[int, ...]:
    """The cuts that are calibrated and judged, ascending."""
    low = max(1, num_layers // 2)
    high = max(1, num_layers - max(1, num_layers // 8))
    step = max(1, math.ceil((high - low + 1) / _MOST))
    return tuple(range(low, high + 1, step)) if num_layers > 1 else ()
