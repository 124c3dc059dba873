"""A kind that tests alone register: y_t = B A x_t + b, a linear layer of low rank.

x -- A' -- B' -- + b --
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from nbl_export.methods import lmmse
from nbl_export.methods.base import OWN, Builder, Kind, Mixer, Port, Streams, TokenWork, Value
from nbl_export.methods.lmmse import Moments
from nbl_export.methods.modules import Wrapped
from nbl_export.methods.rows import Read

__all__ = ["RANK", "THIN", "Thin"]

RANK = 3


@dataclass(frozen=True)
class Thin:
    """A [R, D], B [D, R] and the bias [D]."""

    down: np.ndarray
    up: np.ndarray
    bias: np.ndarray
    kind = "thin"
    reads = (Read(),)
    gives = (Port.OUTPUT,)
    holds_cache = False

    @property
    def size(self) -> int:
        return len(self.bias)

    def tensors(self) -> dict[str, np.ndarray]:
        return {"down": self.down, "up": self.up, "bias": self.bias}

    def product(self) -> None:
        return None

    def emit(self, build: Builder, streams: Streams) -> dict[Port, Value]:
        few = build.matmul(streams[OWN], self.down, "down")
        return {Port.OUTPUT: build.add(build.matmul(few, self.up, "up"), self.bias, "bias")}

    def module(self, multiplier: float = 1.0) -> Wrapped:
        made = THIN.blank(self.size, multiplier)
        state = {"0.weight": self.down, "1.weight": self.up, "1.bias": self.bias}
        made.linear.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
        return made

    def work(self) -> tuple[TokenWork, ...]:
        return (TokenWork(self.down.size + self.up.size, self.down.size + self.up.size),)


class _Thin(Kind):
    name = "thin"

    def fit(self, moments: Moments, layer: int, *, bias: bool = True) -> Thin:
        found = lmmse.fit(moments, layer, bias=bias)
        u, s, v = np.linalg.svd(found.weight, full_matrices=False)
        return Thin(v[:RANK].copy(), u[:, :RANK] * s[:RANK], found.bias)

    def from_tensors(self, tensors: Mapping[str, np.ndarray]) -> Thin:
        return Thin(tensors["down"], tensors["up"], tensors["bias"])

    def blank(self, size: int, multiplier: float = 1.0, like: Mixer | None = None) -> Wrapped:
        return Wrapped(nn.Sequential(nn.Linear(size, RANK, bias=False), nn.Linear(RANK, size)), multiplier)

    def from_module(self, state: Mapping[str, np.ndarray], size: int) -> Thin:
        return Thin(state["linear.0.weight"], state["linear.1.weight"], state["linear.1.bias"])


THIN = _Thin()
