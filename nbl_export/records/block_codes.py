"""A matrix in codes of a few bits, with a scale and possibly an offset a block.

W[n, k]  =  scale[n, k // size] * (code[n, k] - zero)  +  offset[n, k // size]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["BlockCodes"]


@dataclass(frozen=True)
class BlockCodes:
    """A matrix [N, K] in blocks along K.

    Attributes:
        codes: [N, K] uint8, below 2^bits.
        bits: 4 or 8.
        size: elements of a block, 16 or 32.
        zero: the code that stands for 0: the middle of the range, or 0.
        scales: [N, K / size] float32.
        offsets: [N, K / size] float32; None for a symmetric type.
    """

    codes: np.ndarray
    bits: int
    size: int
    zero: int
    scales: np.ndarray
    offsets: np.ndarray | None = None

    @property
    def values(self) -> np.ndarray:
        """The matrix [N, K] in float32."""
        coded = (self.codes.astype(np.float32) - np.float32(self.zero)) * self._spread(self.scales)
        return coded if self.offsets is None else coded + self._spread(self.offsets)

    def _spread(self, values: np.ndarray) -> np.ndarray:
        return np.repeat(values, self.size, 1)

    @property
    def packed(self) -> np.ndarray:
        """Codes in bytes [N, blocks, bytes of a block]; of two 4-bit codes the first has the low bits."""
        found = self.codes if self.bits == 8 else self.codes[:, ::2] | (self.codes[:, 1::2] << 4)
        return found.reshape(*self.scales.shape, -1)
