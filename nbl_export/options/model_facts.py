"""What options depend on in a model, as `run.facts` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.plan import TAPS

__all__ = ["ModelFacts"]


@dataclass(frozen=True)
class ModelFacts:
    """What options depend on in a model. A default means that the fact is unknown, or that the model is without it.

    Attributes:
        maps_tap: the tap of the maps, if the model is an NBL checkpoint.
        kinds: of the mixers of an NBL checkpoint.
        architecture, taps, not_from: name, possible taps, and decoder source -> why it exports no such graph.
        decoder: the decoder's sizes.
        fits: whether the whole model fits into this machine's memory in float32.
    """

    maps_tap: str = ""
    kinds: frozenset[str] = frozenset()
    architecture: str = ""
    taps: tuple[str, ...] = TAPS
    not_from: Mapping[str, str] = field(default_factory=dict)
    decoder: DecoderSpec | None = None
    fits: bool = True
