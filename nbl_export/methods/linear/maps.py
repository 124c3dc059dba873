"""A linear layer in place of attention: y = x W' + b of the token's own row x.

    x -- W' -- + b --

A bias of zeros is not added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nbl_export.methods.base import OWN, Builder, Kind, Mixer, Port, Streams, TokenWork, Value
from nbl_export.methods.rows import Read
from nbl_export.records.from_json import require

if TYPE_CHECKING:
    from nbl_export.methods.lmmse import Moments

__all__ = ["LINEAR", "Linear"]


@dataclass(frozen=True)
class Linear:
    """attention(norm(x)) ~ x W' + b for rows x of the tap; weight [D, D] and bias [D], float32."""

    weight: np.ndarray
    bias: np.ndarray
    kind = "linear"
    reads = (Read(),)
    gives = (Port.OUTPUT,)
    holds_cache = False

    def __post_init__(self) -> None:
        require(self.weight.ndim == 2 and self.bias.ndim == 1, "weight is a matrix, bias a vector")
        require(self.weight.shape[0] == self.weight.shape[1], "the weight is not square")
        require(self.weight.shape[0] == self.bias.shape[0], "weight and bias disagree on the output size")

    @property
    def size(self) -> int:
        return len(self.bias)

    @property
    def _has_bias(self) -> bool:
        return bool(self.bias.any())

    def tensors(self) -> dict[str, np.ndarray]:
        """The weight [D, D] and the bias [D]."""
        return {"weight": self.weight, "bias": self.bias}

    def product(self) -> np.ndarray | None:
        return None if self._has_bias else self.weight

    def emit(self, build: Builder, streams: Streams) -> dict[Port, Value]:
        x = build.matmul(streams[OWN], self.weight, "weight")
        return {Port.OUTPUT: build.add(x, self.bias, "bias") if self._has_bias else x}

    def module(self, multiplier: float = 1.0) -> Any:
        import torch

        made = LINEAR.blank(self.size, multiplier)
        made.linear.load_state_dict({n: torch.from_numpy(getattr(self, n)) for n in ("weight", "bias")})
        return made

    def work(self) -> tuple[TokenWork, ...]:
        return (TokenWork(self.weight.size, self.weight.size),)


class _Linear(Kind):
    name = "linear"

    def fit(self, moments: Moments, layer: int, *, bias: bool = True) -> Linear:
        from nbl_export.methods import lmmse

        return Linear(*lmmse.fit(moments, layer, bias=bias))

    def from_tensors(self, tensors: Mapping[str, np.ndarray]) -> Linear:
        return Linear(tensors["weight"], tensors["bias"])

    def blank(self, size: int, multiplier: float = 1.0, like: Mixer | None = None) -> Any:
        from torch import nn

        from nbl_export.methods.modules import Wrapped

        return Wrapped(nn.Linear(size, size), multiplier)

    def from_module(self, state: Mapping[str, np.ndarray], size: int) -> Linear:
        return Linear(state["linear.weight"], state["linear.bias"])

    def trained(self, mixer: Mixer, rank: int, generator: Any) -> Any:
        from nbl_export.methods.modules import TrainedLinear

        return TrainedLinear(mixer.module().linear, rank, generator)


LINEAR = _Linear()
