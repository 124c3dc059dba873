"""Unpacks matrices of a few bits: packed blocks of ONNX Runtime's operators and of ONNX's DequantizeLinear.

    codes [N, K]  -  zero points [N, blocks]  times  scales [N, blocks]   ─►   matrix [N, K] float32

The layout is from the operators' documentation (onnxruntime, docs/ContribOperators.md, MatMulNBits and
GatherBlockQuantized). The first of two codes in a byte has the low four bits. `verify.products` runs the kernels
that verify this layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["Blocks", "StoredMatrix", "unpacked"]


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks along its last axis.

    Attributes:
        codes: [N, K] float32, zero points subtracted.
        scales: [N, blocks] float32.
        size: elements of a block.
        offsets: [N, blocks] float32, which other nodes add (`block_sums`); None without.
    """

    codes: np.ndarray
    scales: np.ndarray
    size: int
    offsets: np.ndarray | None = None

    @property
    def steps(self) -> np.ndarray:
        """Value of one code step, for each element [N, K]."""
        return self._spread(self.scales)

    @property
    def coded(self) -> np.ndarray:
        """The values of the codes [N, K] in float32, which the node itself multiplies by or looks up."""
        return self.codes * self.steps

    @property
    def matrix(self) -> np.ndarray:
        """The matrix [N, K] in float32: codes and offsets."""
        return self.coded if self.offsets is None else self.coded + self._spread(self.offsets)

    def _spread(self, values: np.ndarray) -> np.ndarray:
        return np.repeat(values, self.size, 1)[:, : self.codes.shape[1]]

    @classmethod
    def packed(
        cls,
        codes: np.ndarray,
        scales: np.ndarray,
        zeros: np.ndarray | None,
        bits: int,
        block: int,
        shape: tuple[int, int],
    ) -> Blocks:
        """Unpack operands of MatMulNBits or GatherBlockQuantized, in any shape that holds `shape` [N, K] row by row.

        Args:
            zeros: packed like the codes, or floats in units of a code; None is the middle of the code range.
        """
        rows, columns = shape
        wide = unpacked(codes, bits, rows)[:, :columns]
        steps = scales.reshape(rows, -1).astype(np.float32)
        if zeros is None:
            return cls(wide - np.float32(2 ** (bits - 1)), steps, block)
        points = zeros.reshape(rows, -1).astype(np.float32) if zeros.dtype.kind == "f" else unpacked(zeros, bits, rows)
        return cls(wide - np.repeat(points[:, : steps.shape[1]], block, 1)[:, :columns], steps, block)


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix that a graph stores in codes.

    Attributes:
        name: node that holds the matrix.
        lookup: whether the matrix is a table [V, D] whose rows are looked up; else it is W [N, K] of y = x W'.
        blocks: unpacks the matrix.
    """

    name: str
    lookup: bool
    blocks: Callable[[], Blocks]


def unpacked(packed: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """Unsigned codes of 4 or 8 bits, one row each [rows, ...], as float32."""
    flat = packed.view(np.uint8).reshape(rows, -1)
    if bits == 8:
        return flat.astype(np.float32)
    return np.stack([flat & 15, flat >> 4], -1).reshape(rows, -1).astype(np.float32)
