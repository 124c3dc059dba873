"""Rounds a float matrix to codes with a scale and an offset a block.

    least squares    sum over a block of (w - scale * q - offset)^2,  q an integer from 0 to 2^bits - 1

Rounding to nearest and the best scale and offset for these q alternate, from the span of the block on; the best of all
steps is kept. A step in the wrong direction is possible, because q is bounded.
"""

from __future__ import annotations

import numpy as np

from nbl_export.records.block_codes import BlockCodes

__all__ = ["rounded"]

_STEPS = 8
_ROWS = 1024  # rows rounded at once, to save memory


def rounded(matrix_NK: np.ndarray, bits: int, size: int) -> BlockCodes:
    """Codes of a float32 matrix whose rows are whole blocks of `size` elements."""
    parts = [_rounded(matrix_NK[at : at + _ROWS], 2**bits - 1, size) for at in range(0, len(matrix_NK), _ROWS)]
    codes, scales, lows = (np.concatenate(found) for found in zip(*parts, strict=True))
    middle = 2 ** (bits - 1)
    return BlockCodes(codes, bits, size, middle, scales, lows + np.float32(middle) * scales)


def _rounded(rows_NK: np.ndarray, most: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], scales and values of the code 0 [N, K / size]."""
    blocks = rows_NK.reshape(len(rows_NK), -1, size).astype(np.float32)
    low = blocks.min(-1, keepdims=True)
    scale = _positive((blocks.max(-1, keepdims=True) - low) / most)
    best = best_scale = best_low = np.empty(0)
    least = np.full(low.shape, np.inf, np.float32)
    for _ in range(_STEPS):
        q = np.clip(np.rint((blocks - low) / scale), 0, most)
        error = np.square(blocks - q * scale - low).sum(-1, keepdims=True)
        better = error < least
        if not best.size:
            best, best_scale, best_low = q, scale, low
        best, least = np.where(better, q, best), np.where(better, error, least)
        best_scale, best_low = np.where(better, scale, best_scale), np.where(better, low, best_low)
        scale, low = _fitted(blocks, q, scale)
    return best.astype(np.uint8).reshape(rows_NK.shape), best_scale[..., 0], best_low[..., 0]


def _fitted(blocks: np.ndarray, q: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the offset of least squares for given codes."""
    mean_q, mean = q.mean(-1, keepdims=True), blocks.mean(-1, keepdims=True)
    spread = np.square(q - mean_q).sum(-1, keepdims=True)
    slope = ((q - mean_q) * (blocks - mean)).sum(-1, keepdims=True) / np.where(spread == 0, 1, spread)
    scale = np.where((spread == 0) | (slope <= 0), before, slope).astype(np.float32)
    return scale, (mean - scale * mean_q).astype(np.float32)


def _positive(scale: np.ndarray) -> np.ndarray:
    """The scale, or 1 for a block of equal elements."""
    return np.where(scale > 0, scale, np.float32(1))
