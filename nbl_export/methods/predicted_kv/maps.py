"""Keys and values of a prompt's skipped tokens, predicted from a lower stream, so that these tokens stop at an exit
layer.

    stream c, all tokens of a step --- norm --- [x_t, x_(t-1)] B' + b --- keys, values of skipped tokens -----+
    layer's own input, last W tokens and the first one --- norm --- queries, own keys, own values --------+- attention

Layers from the exit layer c up keep their weights, their attention and their cache. Of a step of T tokens, the first
one and the last W continue above the exit layer: their keys and values are the layer's own. The keys and values of all
others are a linear map of the stream that enters layer c, before rotary embedding, fitted as every map is (`lmmse`).
The map reads the token's own row and the row of the token before it: a head that copies needs the token before.

A step of at most W + 1 tokens is the original's. So is every decode step: it reads a cache that holds predicted KV.
The norm is the RMS norm without a weight, which the map includes. Layer c reads its own stream, so its map is exact.

Published relatives: POP (arXiv 2602.03295) applies the layer's own products to the stream at the exit layer; SwiftKV
(arXiv 2410.03960) trains new ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.errors import NblError, RefusalError
from nbl_export.methods.base import Stored, TokenWork
from nbl_export.methods.rows import Read, Reads, Rows
from nbl_export.records.decoder import MOST_POSITIONS
from nbl_export.records.from_json import require
from nbl_export.records.plan import PREDICTED_KV

__all__ = ["PredictedKV", "exit_of", "require_keys", "rows_read"]


@dataclass(frozen=True)
class PredictedKV:
    """The map of one layer's keys and values, float32.

    Attributes:
        weight: [2 K, 2 D], keys before values; the columns of the token before come last.
        bias: [2 K].
        inputs: D, the width of the stream.
        exit_layer: the stream that it reads; layers from this one up have a map each.
        recent_tokens: W, the tokens at the end of a step that continue.
        epsilon: of the norm.
    """

    weight: np.ndarray
    bias: np.ndarray
    inputs: int
    exit_layer: int
    recent_tokens: int
    epsilon: float
    kind = PREDICTED_KV
    holds_cache = True

    def __post_init__(self) -> None:
        require(self.weight.ndim == 2 and self.bias.shape == (len(self.weight),), "weight is a matrix, bias its rows")
        require(len(self.weight) % 2 == 0, "keys and values have one width")
        require(self.weight.shape[1] == 2 * self.inputs, "the map reads two rows")
        require(
            self.exit_layer >= 0 and 1 <= self.recent_tokens <= MOST_POSITIONS,
            "there is no such exit layer or number of recent tokens",
        )
        require(0 < self.epsilon < 1, "epsilon is between 0 and 1")

    @property
    def reads(self) -> Reads:
        return (Read(rows=Rows.LAST, tokens=self.recent_tokens), Read(self.exit_layer, Rows.ALL))

    @property
    def size(self) -> int:
        return self.inputs

    def tensors(self) -> dict[str, np.ndarray]:
        """The map, and its numbers."""
        numbers = np.array([self.inputs, self.exit_layer, self.recent_tokens, self.epsilon], np.float32)
        return {"weight": self.weight, "bias": self.bias, "numbers": numbers}

    def product(self) -> None:
        return None

    def __call__(self, x_BTD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [B, T, K] of all tokens of a step, before rotary, from the stream at the exit layer."""
        keys, values = np.split(rows_read(x_BTD, self.epsilon) @ self.weight.T + self.bias, 2, -1)
        return keys, values

    def stored(self) -> tuple[Stored, Stored]:
        return {"weight": self.weight}, {"bias": self.bias}

    def module(self, multiplier: float = 1.0) -> Any:
        import torch

        from nbl_export.methods.predicted_kv.module import PredictedKVModule

        made = PredictedKVModule(self)
        made.linear.load_state_dict({n: torch.from_numpy(getattr(self, n)) for n in ("weight", "bias")})
        return made

    def trained(self, rank: int, generator: Any) -> None:
        return None

    def work(self) -> tuple[TokenWork, ...]:
        return TokenWork(0, 0), TokenWork(self.weight.size, self.weight.size)


def rows_read(x_BTD: np.ndarray, epsilon: float) -> np.ndarray:
    """What a map reads, [B, T, 2 D]: normed rows of the stream at the exit layer, and beside each the row before it.

    The first token of a step stands before itself. It continues, so its map is not used.
    """
    x = x_BTD / np.sqrt(np.square(x_BTD).mean(-1, keepdims=True) + np.float32(epsilon))
    return np.concatenate([x, np.concatenate([x[:, :1], x[:, :-1]], 1)], 2)


def exit_of(maps: Mapping[int, PredictedKV]) -> PredictedKV:
    """A map of a model, whose exit layer, recent tokens and norm are those of all its maps.

    Raises:
        NblError: the maps have several exit layers.
    """
    found = {(mixer.exit_layer, mixer.recent_tokens) for mixer in maps.values()}
    if len(found) > 1:
        raise NblError(f"the maps have several exit layers or numbers of recent tokens: {sorted(found)}")
    return next(iter(maps.values()))


def require_keys(layer: int, mixer: PredictedKV, keys: int | None) -> None:
    """Compare what a map predicts with the numbers of a token's keys in a graph; None if the graph does not say.

    Raises:
        RefusalError: the map is of another width.
    """
    predicted = len(mixer.weight) // 2
    if keys not in (predicted, None):
        raise RefusalError(layer, f"its map predicts keys {predicted} wide, and the graph's are {keys} wide")
