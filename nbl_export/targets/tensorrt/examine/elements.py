"""Arrays of a GPU's element types in numpy, which has no bfloat16: its bits are kept as uint16."""

from __future__ import annotations

import numpy as np

__all__ = ["empty", "narrowed", "widened"]

_HOST = {
    "float16": np.float16, "float32": np.float32, "bfloat16": np.uint16, "int64": np.int64, "int32": np.int32,
    "bool": np.bool_, "int8": np.int8,
}  # fmt: skip


def empty(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array to copy from the device into."""
    return np.empty(shape, _HOST[dtype])


def narrowed(array: np.ndarray, dtype: str) -> np.ndarray:
    """A contiguous array for the device; float32 is rounded to the nearest, to even in a tie."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(array, _HOST[dtype])
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), np.uint32(0x7FC0), rounded).astype(np.uint16)


def widened(array: np.ndarray, dtype: str) -> np.ndarray:
    """An array from the device as float32."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
