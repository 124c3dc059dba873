"""Attention dropped: the layer adds nothing in its place. The baseline of Erdogan et al. 2025."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nbl_export.methods.base import Builder, Kind, Mixer, Port, Streams, TokenWork, Value
from nbl_export.methods.rows import Read

if TYPE_CHECKING:
    from nbl_export.methods.lmmse import Moments

__all__ = ["NONE", "Nothing"]


@dataclass(frozen=True)
class Nothing:
    """Adds nothing to the residual stream of a layer that is `size` wide."""

    size: int
    kind = "none"
    reads = (Read(),)
    gives = (Port.OUTPUT,)
    holds_cache = False

    def tensors(self) -> dict[str, np.ndarray]:
        """An empty tensor [0, D], from which a file tells the layer and its width."""
        return {"nothing": np.zeros((0, self.size), np.float32)}

    def product(self) -> np.ndarray:
        """A matrix of zeros, for formats that have no layer without a mixer."""
        return np.zeros((self.size, self.size), np.float32)

    def emit(self, build: Builder, streams: Streams) -> dict[Port, Value]:
        return {}

    def module(self, multiplier: float = 1.0) -> Any:
        from nbl_export.methods.modules import NothingModule

        return NothingModule()

    def work(self) -> tuple[TokenWork, ...]:
        return (TokenWork(0, 0),)


class _None(Kind):
    """Scores are those of a linear layer, which order the layers as in the paper."""

    name = "none"

    def fit(self, moments: Moments, layer: int, *, bias: bool = True) -> Mixer:
        return Nothing(len(moments.y_sum))

    def from_tensors(self, tensors: Mapping[str, np.ndarray]) -> Mixer:
        return Nothing(tensors["nothing"].shape[1])

    def blank(self, size: int, multiplier: float = 1.0, like: Mixer | None = None) -> Any:
        return Nothing(size).module(multiplier)

    def from_module(self, state: Mapping[str, np.ndarray], size: int) -> Mixer:
        return Nothing(size)


NONE = _None()
