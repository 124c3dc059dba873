"""Numbers of a few bits: what the packed blocks of ONNX Runtime's operators and of ONNX's DequantizeLinear stand for.

    codes [N, K]  -  zero points [N, blocks]  times  scales [N, blocks]   ─►   matrix [N, K] float32

The layout is that of the operators' documentation (onnxruntime, docs/ContribOperators.md, MatMulNBits and
GatherBlockQuantized): of two codes in a byte the first has the low four bits. `engines.ort_products` holds it to
what the kernels compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["Blocks", "StoredMatrix", "unpacked"]


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks along its last axis.

    codes: [N, K], minus their zero points, float32. scales: [N, blocks] float32. size: elements of a block.
    """

    codes: np.ndarray
    scales: np.ndarray
    size: int

    @property
    def steps(self) -> np.ndarray:
        """What one code more is worth, for each element [N, K]."""
        return np.repeat(self.scales, self.size, 1)[:, : self.codes.shape[1]]

    @property
    def matrix(self) -> np.ndarray:
        """[N, K] float32."""
        return self.codes * self.steps

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
        """From the operands of MatMulNBits or GatherBlockQuantized, in any shape that holds `shape` [N, K] row by row.

        Args:
            zeros: packed as the codes are; None is the middle of the codes. Floating-point ones are in units of a code.
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
    """A matrix of a graph in codes.

    name: of the node that holds it. lookup: it is a table whose rows are looked up, [V, D]; else W [N, K] of y = x W'.
    blocks: unpacks it.
    """

    name: str
    lookup: bool
    blocks: Callable[[], Blocks]


def unpacked(packed: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """Codes of 4 or 8 bits, unsigned, a row each [rows, ...], float32."""
    flat = packed.view(np.uint8).reshape(rows, -1)
    if bits == 8:
        return flat.astype(np.float32)
    return np.stack([flat & 15, flat >> 4], -1).reshape(rows, -1).astype(np.float32)
