"""Replaced layers and their maps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.records.from_json import require

__all__ = ["MAPS", "TAPS", "AffineMap", "LayerScore", "Plan", "layers_below", "spoken_layers", "zero_map"]


@dataclass(frozen=True)
class LayerScore:
    """How well one affine map can replace a layer's attention (method: Erdogan et al. 2025).

    Attributes:
        bound: sum_i (1 - rho_i^2) over the canonical correlations of input and residual output (CCA); smaller is
            better. This bound on the residual output's NMSE is loose: up to the hidden size. For SmolLM2 the bound is
            11 to 99, and no NMSE is above 1. So the bound serves only to rank layers.
        nmse: exact calibration error of the attention output, tr(Cyy - W Cxy) / tr(Cyy).
        relative_error: the same error relative to the residual output, tr(Cyy - W Cxy) / tr(C++).
    """

    layer: int
    bound: float
    nmse: float
    relative_error: float


@dataclass(frozen=True)
class AffineMap:
    """attention(norm(x)) ~ t W' + b for rows t of the tap (see `TAPS`); weight [D, D] and bias [D], float32.

    A map of rank k < D / 2 also has the factors up [D, k] and down [k, D] of its weight, W = up down. Graphs then use
    two thin products, which are cheaper than one square product.
    """

    weight: np.ndarray
    bias: np.ndarray
    up: np.ndarray | None = None
    down: np.ndarray | None = None

    def __post_init__(self) -> None:
        require(self.weight.ndim == 2 and self.bias.ndim == 1, "weight is a matrix, bias a vector")
        require(self.weight.shape[0] == self.bias.shape[0], "weight and bias disagree on the output size")
        require((self.up is None) == (self.down is None), "a map has both factors or none")
        if self.up is not None and self.down is not None:
            same = (
                self.up.shape[1] == self.down.shape[0] and (self.up.shape[0], self.down.shape[1]) == self.weight.shape
            )
            require(same, "the factors are not of this weight")

    @property
    def has_bias(self) -> bool:
        """Whether b is not zero. Graphs add no bias of zeros."""
        return bool(self.bias.any())

    @classmethod
    def factored(cls, up: np.ndarray, down: np.ndarray, bias: np.ndarray) -> AffineMap:
        """The map whose weight is up down."""
        return cls(up @ down, bias, up, down)

    @property
    def matrices(self) -> dict[str, np.ndarray]:
        """Stored matrices by name, in the order of the products: the weight, or down and then up."""
        if self.up is None or self.down is None:
            return {"weight": self.weight}
        return {"down": self.down, "up": self.up}


def spoken_layers(layers: Sequence[int]) -> str:
    """Sorted layers as the command line takes them: 0, 7, 24-29."""
    starts = [i for i in layers if i - 1 not in layers]
    ends = [i for i in layers if i + 1 not in layers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def layers_below(replaced: Collection[int]) -> range:
    """Replaced layers below the first kept one."""
    return range(next(i for i in range(len(replaced) + 1) if i not in replaced))


# Input of a map. residual: the residual stream before the layer's norm, as in the paper's reference code. normed: the
# layer's normed input, well conditioned, and expected by engines that know linear-replaced attention.
TAPS = ("residual", "normed")


# affine: x W' + b, the method as published. linear: x W' of the normed input, for formats that store no bias.
MAPS = ("affine", "linear")


@dataclass(frozen=True)
class Plan:
    """The layers whose attention is replaced. The empty plan is legal and means the original model."""

    num_layers: int
    replaced: tuple[int, ...]
    tap: str = "residual"
    select: str = "cca"
    scores: tuple[LayerScore, ...] = ()

    def __post_init__(self) -> None:
        require(self.replaced == tuple(sorted(set(self.replaced))), "replaced layers are sorted and distinct")
        require(all(0 <= i < self.num_layers for i in self.replaced), "a replaced layer does not exist")
        require(len(self.replaced) < self.num_layers, "at least one attention layer stays")
        require(self.tap in TAPS, f"unknown tap {self.tap!r}; taps are {', '.join(TAPS)}")

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Plan:
        """The plan that the facts of a manifest record."""
        scores = tuple(LayerScore(**score) for score in facts["scores"])
        return cls(facts["num_layers"], tuple(facts["replaced_layers"]), facts["tap"], facts["select"], scores)

    @property
    def kept(self) -> tuple[int, ...]:
        """Layers that keep attention and cache, ascending."""
        gone = set(self.replaced)
        return tuple(i for i in range(self.num_layers) if i not in gone)


def zero_map(size: int) -> AffineMap:
    """The map [D, D] to zero, which drops attention: the baseline of Erdogan et al. 2025."""
    return AffineMap(np.zeros((size, size), np.float32), np.zeros(size, np.float32))
