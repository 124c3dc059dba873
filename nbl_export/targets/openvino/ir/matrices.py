"""The matrices that an IR stores in codes or in 16 bits, with the values that a product multiplies by.

Constant (u8, i8, u4, i4, f16) ── Convert ── Subtract (zero points) ── Multiply (scales) ── Reshape ── Convert ── MatMul
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from nbl_export.errors import CorruptError
from nbl_export.records.quantised import Blocks, StoredMatrix

__all__ = ["constant_of", "constants_of", "count_parameters", "float_constant", "raw_bytes", "stored_matrices"]

_INDICES = ("i64", "i32", "boolean")
_MOVES = ("Convert", "Reshape")
_BITS = {"u4": 4, "i4": 4, "u8": 8, "i8": 8}


def stored_matrices(model: Any) -> list[StoredMatrix]:
    """The matrices of products and look-ups that are not float32, in the order of the graph."""
    found = []
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in ("MatMul", "Gather"):
            continue
        places = (0,) if kind == "Gather" else (1, 0)
        for place in places:
            chain = _chain(node.input_value(place))
            if chain is None or len(chain[0].get_output_shape(0)) < 2 or _type(chain[0]) in ("f32", *_INDICES):
                continue
            transposed = kind == "Gather" or node.get_attributes()[f"transpose_{'ab'[place]}"] == (place == 1)
            blocks = functools.partial(_blocks, chain, transposed)
            found.append(StoredMatrix(node.get_friendly_name(), kind == "Gather", blocks))
            break
    return found


def count_parameters(model: Any) -> int:
    """Elements of all weights: floats and codes with more than one element, without scales and zero points."""
    apart = set()
    for node in model.get_ops():
        if node.get_type_name() in ("Multiply", "Subtract"):
            chain, other = _chain(node.input_value(0)), _bare(node.input_value(1))
            if chain is not None and other is not None:
                apart.add(other.get_friendly_name())
    sizes = {
        node.get_friendly_name(): int(np.prod(node.get_output_shape(0)))
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and _type(node) not in _INDICES
    }
    return sum(size for name, size in sizes.items() if size > 1 and name not in apart)


def constants_of(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Name and bytes of each constant with more than one element, apart from shapes and indices."""
    for node in model.get_ops():
        if node.get_type_name() != "Constant" or _type(node) in _INDICES:
            continue
        if np.prod(node.get_output_shape(0)) > 1:
            yield node.get_friendly_name(), raw_bytes(node)


def constant_of(model: Any, name: str) -> np.ndarray | None:
    """Float values of a constant by its name; None if there is none."""
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and node.get_friendly_name() == name:
            return float_constant(node)
    return None


def float_constant(node: Any) -> np.ndarray:
    """Values of a floating-point constant, in float32."""
    return np.asarray(node.get_data(), np.float32)


def _type(node: Any) -> str:
    return str(node.get_output_element_type(0).to_string())


def raw_bytes(node: Any) -> np.ndarray:
    """Bytes of a constant; two codes of 4 bits share a byte."""
    return np.atleast_1d(np.asarray(node.data)).reshape(-1).view(np.uint8)


def _chain(value: Any) -> tuple[Any, Any | None, Any | None] | None:
    """The constant that a value is made of, its zero points and its scales; None if the value depends on inputs."""
    zeros = scales = None
    node = value.get_node()
    while node.get_type_name() != "Constant":
        kind = node.get_type_name()
        if kind in _MOVES:
            node = node.input_value(0).get_node()
            continue
        if kind not in ("Multiply", "Subtract"):
            return None
        other = _bare(node.input_value(1))
        if other is None:
            return None
        zeros, scales = (other, scales) if kind == "Subtract" else (zeros, other)
        node = node.input_value(0).get_node()
    return node, zeros, scales


def _bare(value: Any) -> Any | None:
    """The constant behind moves, or None."""
    node = value.get_node()
    while node.get_type_name() in _MOVES:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def _blocks(chain: tuple[Any, Any | None, Any | None], transposed: bool) -> Blocks:
    """The matrix [N, K] in blocks; a matrix of 16-bit floats has a block for each element, whose scale is its last bit.

    Raises:
        CorruptError: the matrix is stored in another layout.
    """
    codes_node, zeros_node, scales_node = chain
    kind = _type(codes_node)
    if kind == "f16":
        return _halves(float_constant(codes_node) if transposed else float_constant(codes_node).T)
    if kind not in _BITS or scales_node is None:
        raise CorruptError(f"the IR stores {codes_node.get_friendly_name()} as {kind}, which is not known here")
    if not transposed:
        raise CorruptError(
            f"the IR stores {codes_node.get_friendly_name()} as [inputs, outputs], which is not known here"
        )
    codes = _values(codes_node)
    rows = codes.shape[0]
    scales = float_constant(scales_node).reshape(rows, -1)
    wide = codes.reshape(rows, scales.shape[1], -1)
    if zeros_node is not None:
        zeros = _values(zeros_node)
        wide = wide - (zeros.reshape(rows, -1, 1) if zeros.size > 1 else zeros.reshape(1, 1, 1))
    return Blocks(np.ascontiguousarray(wide.reshape(rows, -1)), scales, wide.shape[2])


def _values(node: Any) -> np.ndarray:
    """Codes as float32, in the constant's shape."""
    kind, shape = _type(node), list(node.get_output_shape(0))
    if kind in ("u8", "i8", "f16", "f32"):
        return np.asarray(node.get_data(), np.float32).reshape(shape)
    packed = np.asarray(node.data).view(np.uint8).reshape(-1)
    flat = np.stack([packed & 15, packed >> 4], -1).reshape(-1)[: int(np.prod(shape))].astype(np.float32)
    return np.where(flat > 7, flat - 16, flat).reshape(shape) if kind == "i4" else flat.reshape(shape)


def _halves(matrix_NK: np.ndarray) -> Blocks:
    """A matrix of 16-bit floats in units of the last of their 11 bits."""
    _, exponents = np.frexp(matrix_NK)
    units = np.ldexp(np.float32(1), np.maximum(exponents, -13) - 11).astype(np.float32)
    return Blocks(matrix_NK / units, units, 1)
