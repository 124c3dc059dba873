"""A linear layer in place of attention: y = x W' + b of the token's own row x.

    full rank    x -- W' -- + b --        rank k < D / 2    x -- down' -- up' -- + b --      W = up down

A bias of zeros is not added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nbl_export.mixers.base import AS_USUAL, Builder, FitOptions, Kind, Mixer, TokenWork, Value
from nbl_export.records.from_json import require

if TYPE_CHECKING:
    from nbl_export.mixers.lmmse import Moments

__all__ = ["LINEAR", "Linear"]


@dataclass(frozen=True)
class Linear:
    """attention(norm(x)) ~ x W' + b for rows x of the tap; weight [D, D] and bias [D], float32.

    A map of rank k < D / 2 also has the factors up [D, k] and down [k, D] of its weight, W = up down. Graphs then use
    two thin products, which are cheaper than one square product.
    """

    weight: np.ndarray
    bias: np.ndarray
    up: np.ndarray | None = None
    down: np.ndarray | None = None
    kind = "linear"
    token_local = True
    state = None

    def __post_init__(self) -> None:
        require(self.weight.ndim == 2 and self.bias.ndim == 1, "weight is a matrix, bias a vector")
        require(self.weight.shape[0] == self.weight.shape[1], "the weight is not square")
        require(self.weight.shape[0] == self.bias.shape[0], "weight and bias disagree on the output size")
        require((self.up is None) == (self.down is None), "a map has both factors or none")
        if self.up is not None and self.down is not None:
            same = (
                self.up.shape[1] == self.down.shape[0] and (self.up.shape[0], self.down.shape[1]) == self.weight.shape
            )
            require(same, "the factors are not of this weight")

    @classmethod
    def factored(cls, up: np.ndarray, down: np.ndarray, bias: np.ndarray) -> Linear:
        """The map whose weight is up down."""
        return cls(up @ down, bias, up, down)

    @property
    def size(self) -> int:
        return len(self.bias)

    @property
    def rank(self) -> int | None:
        return None if self.up is None else self.up.shape[1]

    @property
    def _has_bias(self) -> bool:
        return bool(self.bias.any())

    def tensors(self) -> dict[str, np.ndarray]:
        """The weight [D, D] or its factors, and the bias [D]."""
        return {**self.matrices(), "bias": self.bias}

    def matrices(self) -> dict[str, np.ndarray]:
        if self.up is None or self.down is None:
            return {"weight": self.weight}
        return {"down": self.down, "up": self.up}

    def with_matrices(self, matrices: Mapping[str, np.ndarray]) -> Linear:
        return LINEAR.from_tensors({**matrices, "bias": self.bias})

    def scaled_input(self, scale_D: np.ndarray) -> Linear:
        down = None if self.down is None else self.down * scale_D
        return dataclasses.replace(self, weight=self.weight * scale_D, down=down)

    def product(self) -> np.ndarray | None:
        return None if self._has_bias else self.weight

    def as_product(self, moments: Moments, layer: int) -> Linear:
        """The map with its bias folded into the matrix; a map without a bias is its own."""
        from nbl_export.mixers import lmmse

        if not self._has_bias:
            return self
        return Linear(lmmse.fold_bias(self.weight, self.bias, moments, layer), np.zeros_like(self.bias))

    def emit(self, build: Builder, x: Value) -> Value:
        for name, matrix in self.matrices().items():
            x = build.matmul(x, matrix, name)
        return build.add(x, self.bias, "bias") if self._has_bias else x

    def module(self, multiplier: float = 1.0) -> Any:
        import torch

        made = LINEAR.blank(self.size, multiplier)
        made.linear.load_state_dict({n: torch.from_numpy(getattr(self, n)) for n in ("weight", "bias")})
        return made

    def work(self) -> TokenWork:
        elements = sum(matrix.size for matrix in self.matrices().values())
        return TokenWork(elements, elements)


class _Linear(Kind):
    name = "linear"

    def fit(self, moments: Moments, layer: int, options: FitOptions = AS_USUAL) -> Linear:
        from nbl_export.mixers import lmmse

        return Linear(*lmmse.fit(moments, layer, rank=options.rank, bias=options.bias))

    def from_tensors(self, tensors: Mapping[str, np.ndarray]) -> Linear:
        if "down" in tensors:
            return Linear.factored(tensors["up"], tensors["down"], tensors["bias"])
        return Linear(tensors["weight"], tensors["bias"])

    def blank(self, size: int, multiplier: float = 1.0, like: Mixer | None = None) -> Any:
        from torch import nn

        from nbl_export.mixers.modules import Wrapped

        return Wrapped(nn.Linear(size, size), multiplier)

    def from_module(self, state: Mapping[str, np.ndarray], size: int, like: Mixer | None = None) -> Linear:
        return Linear(state["linear.weight"], state["linear.bias"])

    def trained(self, mixer: Mixer, rank: int, generator: Any) -> Any:
        from nbl_export.mixers.modules import TrainedLinear

        return TrainedLinear(mixer.module().linear, rank, generator)


LINEAR = _Linear()
