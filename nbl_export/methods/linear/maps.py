"""A linear layer in place of attention: y = x W' + b of the token's own row x.

    x -- W' -- + b --

A bias of zeros is not added. A map of zeros adds nothing: attention is dropped (the baseline of Erdogan et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.methods.base import Stored, TokenWork
from nbl_export.methods.rows import Read
from nbl_export.records.from_json import require

__all__ = ["Linear"]


@dataclass(frozen=True)
class Linear:
    """attention(norm(x)) ~ x W' + b for rows x of the tap; weight [D, D] and bias [D], float32."""

    weight: np.ndarray
    bias: np.ndarray
    kind = "linear"
    reads = (Read(),)
    holds_cache = False

    def __post_init__(self) -> None:
        require(self.weight.ndim == 2 and self.bias.ndim == 1, "weight is a matrix, bias a vector")
        require(self.weight.shape[0] == self.weight.shape[1], "the weight is not square")
        require(self.weight.shape[0] == self.bias.shape[0], "weight and bias disagree on the output size")

    @staticmethod
    def zeros(size: int) -> Linear:
        """Attention dropped: the layer adds nothing in its place."""
        return Linear(np.zeros((size, size), np.float32), np.zeros(size, np.float32))

    @property
    def size(self) -> int:
        return len(self.bias)

    def __call__(self, x_BTD: np.ndarray) -> np.ndarray:
        """x W' + b in float32."""
        y: np.ndarray = x_BTD.astype(np.float32) @ self.weight.T + self.bias
        return y

    def tensors(self) -> dict[str, np.ndarray]:
        """The weight [D, D] and the bias [D]."""
        return {"weight": self.weight, "bias": self.bias}

    def stored(self) -> tuple[Stored, Stored]:
        vectors = {"bias": self.bias} if self.bias.any() else {}
        return ({"weight": self.weight} if vectors or self.weight.any() else {}), vectors

    def product(self) -> np.ndarray | None:
        return None if self.bias.any() else self.weight

    def module(self, multiplier: float = 1.0) -> Any:
        import torch
        from torch import nn

        from nbl_export.methods.modules import Wrapped

        made = nn.Linear(self.size, self.size)
        made.load_state_dict({name: torch.from_numpy(array) for name, array in self.tensors().items()})
        return Wrapped(made, multiplier)

    def trained(self, rank: int, generator: Any) -> Any:
        from nbl_export.methods.modules import TrainedLinear

        return TrainedLinear(self.module().linear, rank, generator)

    def work(self) -> tuple[TokenWork, ...]:
        elements = self.weight.size if self.stored()[0] else 0
        return (TokenWork(elements, elements),)
