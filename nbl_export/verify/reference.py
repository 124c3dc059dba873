"""The reference that a graph is compared with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

__all__ = ["Reference"]


@dataclass(frozen=True)
class Reference:
    """Teacher-forced logits of each row, [length, V] float32, and greedy continuations of the prompts.

    `noise` [length] is the largest change of each position's logits if the embeddings are perturbed by a few float32
    roundings. Two correct float32 engines can differ by a multiple of this noise. The noise is small everywhere in an
    ordinary model. It is large at tokens on the edge of a massive activation (half an attention sink). Linearized
    early layers make such tokens more frequent. The noise is zero until it is measured, and then `noisy` is true.

    `margins` are the gaps between the best and second-best logit at each greedy step. If a gap is below the numerical
    noise, another engine may choose the other token.

    `long` [positions, V] and `long_noise` belong to the long row, at `ladder.shown_positions`.

    The torch model (`torch_reference`) or the input graph (`graph_reference`, with zero noise) makes a reference.
    """

    logits: tuple[np.ndarray, ...]
    noise: tuple[np.ndarray, ...]
    greedy: tuple[tuple[int, ...], ...]
    margins: tuple[tuple[float, ...], ...]
    long: np.ndarray | None = None
    long_noise: np.ndarray | None = None
    noisy: bool = False

    @property
    def quiet(self) -> Reference:
        """The same reference without noise."""
        noise = tuple(np.zeros_like(row) for row in self.noise)
        long = None if self.long_noise is None else np.zeros_like(self.long_noise)
        return dataclasses.replace(self, noise=noise, long_noise=long, noisy=False)
