"""Matrices that a graph stores in codes: integers with scales, possibly with zero points.

    MatMulNBits(x, codes, scales[, zeros])            y = x W'      W [N, K], blocks along K
    GatherBlockQuantized(codes, ids, scales[, zeros])  rows of W     W [V, D], blocks along D
    DequantizeLinear(codes, scales[, zeros])           either        for the whole tensor, an axis, or in blocks
    MatMulInteger(x, codes[, ., zeros])                y = x W'      W without its scale, which a later node applies
    QMoE(x, scores, codes, scales, ...)                experts       W of all experts, one below the other, twice

`read` refuses codes that are computed, codes sorted by activation (g_idx), and codes dequantised to a type other than
float32.

TensorRT accepts int4 blocks in standard operators:

    before   MatMul(x, W [K, N])
    after    MatMul(x, DequantizeLinear(W4 [K, N] int4, scale [K / block, N]; axis 0, block_size))

Rounding is symmetric, to nearest, along K. Scales have the weight's float type and are positive, because TensorRT's
parser refuses others ("Scale coefficients must all be positive"). A block takes the smallest scale that holds its
largest value (as 7) and its smallest (as -8). TensorRT accepts int4 without zero points and in blocks along K only
(TensorRT documentation, "Working with Quantized Types").
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.emitter import register
from nbl_export.graph.files import read_graph
from nbl_export.records.quantised import Blocks, StoredMatrix, unpacked

__all__ = [
    "HOLDERS",
    "expert_matrices",
    "int4_blocks",
    "quantised_matrices",
    "quantize_weight",
    "read",
    "stored_matrices",
]

_UNKNOWN = ("MatMulBnb4", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulFpQ4")

Read = Callable[[], np.ndarray]


def stored_matrices(path: Path) -> list[StoredMatrix]:
    """The quantised matrices of a graph file; empty if the graph stores nothing in codes."""
    graph = read_graph(path).graph
    return [*quantised_matrices(graph).values(), *(m for pair in expert_matrices(graph).values() for m in pair)]


def quantised_matrices(graph: ir.Graph) -> dict[ir.Node, StoredMatrix]:
    """The quantised matrices by node, in order; without a DequantizeLinear of a tensor that is no matrix.

    Raises:
        RefusalError: the codes are refused (see the module), or an operator with codes is not in the table there.
    """
    found = {}
    for node in graph:
        if node.op_type in _UNKNOWN:
            raise RefusalError(None, f"the float32 form of {node.op_type} ({node.name}) is not known")
        if node.op_type in HOLDERS and (matrix := read(node)) is not None:
            found[node] = matrix
    return found


def expert_matrices(graph: ir.Graph) -> dict[ir.Node, tuple[StoredMatrix, ...]]:
    """The matrices [experts * N, K] of nodes with experts in codes: of their first and of their second products.

    Raises:
        RefusalError: the experts have a third matrix or codes of another kind, or compute in another type than float32.
    """
    found = {}
    for node in (node for node in graph if node.op_type == "QMoE"):
        kind = node.attributes.get_string("quant_type", "int")
        if kind != "int" or any(value is not None for value in node.inputs[8:]):
            raise RefusalError(None, f"the float32 form of the experts of {node.name} is not known")
        found[node] = tuple(_experts(node, place, f"{node.name}/fc{1 + k}") for k, place in enumerate((2, 5)))
    return found


def _experts(node: ir.Node, place: int, name: str) -> StoredMatrix:
    codes, scales, _ = _operands(node, (place, place + 1, len(node.inputs)))
    bits = _number(node, "expert_weight_bits", 4)
    experts, rows, packed = (int(d) for d in _tensor(node, place).shape.numpy())
    shape = (experts * rows, packed * 8 // bits)
    size = _number(node, "block_size", 0) or shape[1]
    return StoredMatrix(name, False, lambda: unpacked(codes(), scales(), None, bits, size, shape), shape)


def read(node: ir.Node) -> StoredMatrix | None:
    """The matrix of a node of `HOLDERS`, not yet unpacked; None for a tensor that is no matrix.

    Raises:
        RefusalError: the codes are refused (see the module).
    """
    return _READERS[node.op_type](node)


def _nbits(node: ir.Node) -> StoredMatrix:
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        raise RefusalError(None, f"the columns of {node.name} are sorted by activation (g_idx)")
    shape = (_number(node, "N", 0), _number(node, "K", 0))
    return StoredMatrix(str(node.name), False, _packed(node, (1, 2, 3), shape, 32), shape, True)


def _table(node: ir.Node) -> StoredMatrix:
    if _number(node, "gather_axis", 0) != 0 or _number(node, "quantize_axis", 1) not in (1, -1):
        raise RefusalError(None, f"{node.name} looks up something else than rows of a matrix")
    scales = _tensor(node, 2)
    rows, blocks = (int(d) for d in scales.shape.numpy())
    shape = (rows, _width(node, blocks * _number(node, "block_size", 128)))
    return StoredMatrix(str(node.name), True, _packed(node, (0, 2, 3), shape, 128), shape)


def _packed(node: ir.Node, places: tuple[int, int, int], shape: tuple[int, int], block: int) -> Callable[[], Blocks]:
    codes, scales, zeros = _operands(node, places)
    bits, size = _number(node, "bits", 4), _number(node, "block_size", block)
    return lambda: unpacked(codes(), scales(), zeros and zeros(), bits, size, shape)


def _dequantised(node: ir.Node) -> StoredMatrix | None:
    dims = _tensor(node, 0).shape.numpy()
    if len(dims) != 2:
        return None
    shape, (codes, scales, zeros) = tuple(map(int, dims)), _operands(node, (0, 1, 2))
    axis, block = _number(node, "axis", 1) % 2, _number(node, "block_size", 0)
    users = list(node.outputs[0].consumers())
    lookup = any(user.op_type == "Gather" for user in users)
    as_stored = any(u.op_type == "Transpose" or (u.op_type == "Gemm" and _number(u, "transB", 0)) for u in users)
    transposed = not lookup and not as_stored

    def unpack() -> Blocks:
        wide, steps = codes().astype(np.float32), _spread(scales(), shape, axis, block)
        if zeros is not None:
            wide = wide - _spread(zeros().astype(np.float32), shape, axis, block)
        if transposed:
            wide, steps = wide.T, steps.T
        size = _size_of_blocks(wide.shape[1], axis == (0 if transposed else 1), block, scales().size)
        return Blocks(np.ascontiguousarray(wide), np.ascontiguousarray(steps[:, ::size]), size)

    rows, columns = reversed(shape) if transposed else shape
    return StoredMatrix(str(node.name), lookup, unpack, (rows, columns), transposed)


def _size_of_blocks(columns: int, along: bool, block: int, scales: int) -> int:
    """Number of elements of a row that share a step: a block, one, or all."""
    if scales == 1 or (not along and not block):
        return columns
    return block if along and block else 1


def _integers(node: ir.Node) -> StoredMatrix:
    codes, _, zeros = _operands(node, (1, -1, 3))
    rows, columns = (int(d) for d in _tensor(node, 1).shape.numpy())

    def unpack() -> Blocks:
        wide = codes().astype(np.float32) - (0.0 if zeros is None else zeros().astype(np.float32))
        return Blocks(np.ascontiguousarray(wide.T), np.ones((columns, 1), np.float32), rows)

    return StoredMatrix(str(node.name), False, unpack, (columns, rows), True)


def _operands(node: ir.Node, places: tuple[int, int, int]) -> tuple[Read, Read, Read | None]:
    """Readers of codes, scales (float32) and zero points (None if absent); place -1 means that there are no scales."""
    codes, zeros = _tensor(node, places[0]), node.inputs[places[2]] if len(node.inputs) > places[2] else None
    points = None if zeros is None else _tensor(node, places[2]).numpy
    if places[1] < 0:
        return codes.numpy, codes.numpy, points
    scales = _tensor(node, places[1])
    if scales.dtype != ir.DataType.FLOAT:
        raise RefusalError(None, f"{node.name} computes in {scales.dtype}; a float32 copy (twin) needs a float32 graph")
    return codes.numpy, scales.numpy, points


def _tensor(node: ir.Node, index: int) -> ir.TensorProtocol:
    value = node.inputs[index] if len(node.inputs) > index else None
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Reshape":  # codes that the head shares with the embedding
        value = producer.inputs[0]
    if value is None or value.const_value is None:
        raise RefusalError(None, f"input {index} of {node.name} is not stored in the graph")
    return value.const_value


def _number(node: ir.Node, name: str, default: int) -> int:
    return node.attributes.get_int(name, default)


def _width(node: ir.Node, most: int) -> int:
    """Width of a table's rows: as the graph states it, else whole blocks."""
    shape = node.outputs[0].shape
    last = None if shape is None or not len(shape) else shape[-1]
    return last if isinstance(last, int) and 0 < last <= most else most


def _spread(values: np.ndarray, shape: tuple[int, ...], axis: int, block: int) -> np.ndarray:
    """A value for each element, from one for the tensor, for each index of an axis, or for each block along it."""
    if values.size == 1:
        return np.broadcast_to(values.reshape(1, 1), shape)
    if block:
        return np.repeat(values, block, axis).take(range(shape[axis]), axis)
    return np.broadcast_to(values.reshape([-1 if k == axis else 1 for k in range(2)]), shape)


_READERS = {
    "MatMulNBits": _nbits,
    "GatherBlockQuantized": _table,
    "DequantizeLinear": _dequantised,
    "MatMulInteger": _integers,
}
HOLDERS = tuple(_READERS)


# -- int4 blocks --------------------------------------------------------------------------------------


def quantize_weight(graph: ir.Graph, node: ir.Node, block: int) -> bool:
    """Put a MatMul's weight behind a DequantizeLinear; returns whether the graph changed.

    A weight stays if another node reads it (a tied embedding), or if it is no stored matrix of whole blocks along K.
    """
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer() or weight.const_value is None or len(weight.uses()) != 1:
        return False
    dims = weight.const_value.shape.numpy()
    if len(dims) != 2 or dims[0] % block:
        return False
    dtype = weight.const_value.dtype
    codes, scales = int4_blocks(weight.const_value.numpy().astype(np.float32), block, dtype.numpy())
    packed = register(graph, ir.tensor(codes, name=f"{weight.name}_int4"))
    scale = register(graph, ir.tensor(scales, dtype=dtype, name=f"{weight.name}_scale"))
    wide = ir.node(
        "DequantizeLinear", [packed, scale], {"axis": 0, "block_size": block}, name=f"{node.name}/DequantizeLinear"
    )
    wide.outputs[0].name = f"{weight.name}_wide"
    wide.outputs[0].shape, wide.outputs[0].type = ir.Shape(dims), ir.TensorType(dtype)
    graph.insert_before(node, [wide])
    node.replace_input_with(1, wide.outputs[0])
    del graph.initializers[str(weight.name)]
    return True


def int4_blocks(weight_KN: np.ndarray, block: int, scale_dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """int4 codes [K, N] and positive scales [K / block, N] of a float32 matrix; codes fit the rounded scales."""
    rows, columns = weight_KN.shape
    blocks = weight_KN.reshape(rows // block, block, columns)
    scale = np.maximum(blocks.max(1, keepdims=True) / 7, blocks.min(1, keepdims=True) / -8).astype(scale_dtype)
    scale[scale <= 0] = 1.0  # a block of zeros, or of numbers too small for the type
    codes = np.clip(np.rint(blocks / scale.astype(np.float32)), -8, 7).reshape(rows, columns)
    return codes.astype(ml_dtypes.int4), np.ascontiguousarray(scale[:, 0])
