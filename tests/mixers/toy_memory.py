"""A kind that tests alone register: y_t = A x_t + B x_(t-1) + b, with a state of one token.

past --+
       concat -- all but the last token -- B' -- + -- + b --
x -----+-------------------------------- A' -----+
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from nbl_export.mixers import lmmse
from nbl_export.mixers.base import OWN, Builder, Kind, Mixer, Port, StateSpec, Streams, TokenWork, Value
from nbl_export.mixers.lmmse import Moments
from nbl_export.mixers.modules import MixerModule
from nbl_export.mixers.rows import Read, Rows

__all__ = ["MEMORY", "Memory"]


@dataclass(frozen=True)
class Memory:
    """A and B [D, D], and the bias [D]."""

    now: np.ndarray
    before: np.ndarray
    bias: np.ndarray
    kind = "memory"
    reads = (Read(rows=Rows.ALL),)
    gives = (Port.OUTPUT,)

    @property
    def holds(self) -> StateSpec:
        return StateSpec(1, self.size)

    @property
    def size(self) -> int:
        return len(self.bias)

    def tensors(self) -> dict[str, np.ndarray]:
        return {"now": self.now, "before": self.before, "bias": self.bias}

    def product(self) -> None:
        return None

    def as_product(self, moments: Moments, layer: int) -> None:
        return None

    def emit(self, build: Builder, streams: Streams) -> dict[Port, Value]:
        x = streams[OWN]
        past = build.state(self.holds, "past")
        rows = build.concat([past, x], "rows")
        build.keep(self.holds, rows, "past")
        now = build.matmul(x, self.now, "now")
        before = build.matmul(build.slice(rows, 0, -1, "earlier"), self.before, "before")
        return {Port.OUTPUT: build.add(build.add(now, before, "both"), self.bias, "bias")}

    def module(self, multiplier: float = 1.0) -> MemoryModule:
        made = MemoryModule(self.size, multiplier)
        made.load_state_dict({name: torch.from_numpy(array) for name, array in self.tensors().items()})
        return made

    def work(self) -> tuple[TokenWork, ...]:
        return (TokenWork(self.now.size + self.before.size, self.now.size + self.before.size),)


class MemoryModule(MixerModule):
    def __init__(self, size: int, multiplier: float = 1.0) -> None:
        super().__init__(multiplier)
        self.state = StateSpec(1, size)
        self.now, self.before = (nn.Parameter(torch.zeros(size, size)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(size))

    def mix(self, x_BTD: torch.Tensor, past_BSD: torch.Tensor | None) -> torch.Tensor:
        assert past_BSD is not None
        earlier_BTD = torch.cat([past_BSD, x_BTD], 1)[:, :-1]
        return x_BTD @ self.now.T + earlier_BTD @ self.before.T + self.bias


class _Memory(Kind):
    name = "memory"

    def feature_count(self, size: int) -> int:
        return 2 * size

    def features(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return torch.cat([x_BTD, nn.functional.pad(x_BTD, (0, 0, 1, 0))[:, :-1]], 2)

    def fit(self, moments: Moments, layer: int, *, bias: bool = True) -> Memory:
        found = lmmse.fit(moments, layer, bias=bias)
        now, before = np.split(found.weight, 2, axis=1)
        return Memory(now, before, found.bias)

    def from_tensors(self, tensors: Mapping[str, np.ndarray]) -> Memory:
        return Memory(tensors["now"], tensors["before"], tensors["bias"])

    def blank(self, size: int, multiplier: float = 1.0, like: Mixer | None = None) -> MemoryModule:
        return MemoryModule(size, multiplier)


MEMORY = _Memory()
