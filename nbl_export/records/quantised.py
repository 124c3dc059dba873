"""A matrix in codes of a few bits, with a scale and possibly a zero point a block, as a file stores it.

    W[n, k]  =  scale[n, k // size] * (code[n, k] - zero[n, k // size])

Of two 4-bit codes in a byte the first has the low bits, in ONNX Runtime's operators (onnxruntime,
docs/ContribOperators.md, MatMulNBits and GatherBlockQuantized).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Blocks", "unpacked"]


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks along its last axis.

    Attributes:
        codes: [N, K]; integers, or floats in units of a scale.
        scales: [N, blocks] float32.
        size: elements of a block.
        zeros: the code that stands for 0: one for the matrix, or one a block [N, blocks].
    """

    codes: np.ndarray
    scales: np.ndarray
    size: int
    zeros: np.ndarray | float = 0.0

    @property
    def values(self) -> np.ndarray:
        """The matrix [N, K] in float32."""
        points = self._spread(self.zeros) if isinstance(self.zeros, np.ndarray) else self.zeros
        values: np.ndarray = (self.codes.astype(np.float32) - points) * self.steps
        return values

    @property
    def steps(self) -> np.ndarray:
        """Value of one code step, for each element [N, K]."""
        return self._spread(self.scales)

    def _spread(self, values: np.ndarray) -> np.ndarray:
        return np.repeat(values, self.size, 1)[:, : self.codes.shape[1]]


def unpacked(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, bits: int, size: int, shape: tuple[int, int]
) -> Blocks:
    """Unpack operands of MatMulNBits or GatherBlockQuantized, in any shape that holds `shape` [N, K] row by row.

    Args:
        zeros: packed like the codes, or floats in units of a code; None is the middle of the code range.
    """
    rows, columns = shape
    steps = scales.reshape(rows, -1).astype(np.float32)
    points: np.ndarray | float = 2.0 ** (bits - 1)
    if zeros is not None:
        wide = zeros.reshape(rows, -1) if zeros.dtype.kind == "f" else _codes(zeros, bits, rows)
        points = wide[:, : steps.shape[1]].astype(np.float32)
    return Blocks(_codes(codes, bits, rows)[:, :columns], steps, size, points)


def _codes(packed: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """Unsigned codes of 4 or 8 bits, one row each [rows, ...]."""
    flat = packed.view(np.uint8).reshape(rows, -1)
    return flat if bits == 8 else np.stack([flat & 15, flat >> 4], -1).reshape(rows, -1)
