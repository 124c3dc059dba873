"""Finds the matrices that a graph stores in codes (integers with scales), and unpacks them.

    MatMulNBits(x, codes, scales[, zeros])            y = x W'      W [N, K], blocks along K
    GatherBlockQuantized(codes, ids, scales[, zeros])  rows of W     W [V, D], blocks along D
    DequantizeLinear(codes, scales[, zeros])           either        for the whole tensor, an axis, or in blocks
    MatMulInteger(x, codes[, ., zeros])                y = x W'      W without its scale, which a later node applies

Refuses codes that are computed, codes sorted by activation (g_idx), and codes dequantised to a type other than float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.coded.block_sums import offsets_of
from nbl_export.graph.coded.nbits import Blocks, StoredMatrix

__all__ = ["HOLDERS", "QuantisedMatrix", "quantised_matrices", "read_codes", "stored_matrices"]

HOLDERS = ("MatMulNBits", "GatherBlockQuantized", "DequantizeLinear", "MatMulInteger")
_UNKNOWN = ("MatMulBnb4", "QMoE", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulFpQ4")

Read = Callable[[], np.ndarray]


@dataclass(frozen=True)
class QuantisedMatrix:
    """A matrix that a node holds in codes.

    Attributes:
        lookup: whether W [V, D] is a table whose rows are looked up; else W [N, K] makes y = x W'.
        transposed: whether the graph multiplies by, or looks up in, W' as stored.
        blocks: unpacks the matrix, along K or D.
    """

    node: ir.Node
    lookup: bool
    transposed: bool
    shape: tuple[int, int]
    blocks: Callable[[], Blocks]

    @property
    def name(self) -> str:
        return str(self.node.name)

    def operand(self) -> np.ndarray:
        """The matrix that a float32 graph has in this place; nodes behind it add the offsets."""
        matrix = self.blocks().coded
        return np.ascontiguousarray(matrix.T) if self.transposed else matrix


def stored_matrices(path: Path) -> list[StoredMatrix]:
    """The quantised matrices of a graph file, without nodes; empty if the graph stores nothing in codes."""
    return [StoredMatrix(m.name, m.lookup, m.blocks) for m in quantised_matrices(ir.load(path).graph)]


def quantised_matrices(graph: ir.Graph) -> Iterator[QuantisedMatrix]:
    """The quantised matrices in the order of the nodes; skips a DequantizeLinear of a tensor that is no matrix.

    Raises:
        RefusalError: the codes are refused (see the module), or an operator with codes is not in the table there.
    """
    for node in graph:
        if node.op_type in _UNKNOWN:
            raise RefusalError(None, f"the float32 form of {node.op_type} ({node.name}) is not known")
        if node.op_type in HOLDERS:
            found = read_codes(node)
            if found is not None:
                yield found


def read_codes(node: ir.Node) -> QuantisedMatrix | None:
    """The matrix of a node of `HOLDERS`, not yet unpacked; None for a tensor that is no matrix.

    Raises:
        RefusalError: the codes are refused (see the module).
    """
    return {"MatMulNBits": _nbits, "GatherBlockQuantized": _table, "DequantizeLinear": _dequantised,
            "MatMulInteger": _integers}[node.op_type](node)  # fmt: skip


def _nbits(node: ir.Node) -> QuantisedMatrix:
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        raise RefusalError(None, f"the columns of {node.name} are sorted by activation (g_idx)")
    shape = (_number(node, "N", 0), _number(node, "K", 0))
    return QuantisedMatrix(node, False, True, shape, _packed(node, (1, 2, 3), shape, 32))


def _table(node: ir.Node) -> QuantisedMatrix:
    if _number(node, "gather_axis", 0) != 0 or _number(node, "quantize_axis", 1) not in (1, -1):
        raise RefusalError(None, f"{node.name} looks up something else than rows of a matrix")
    scales = _tensor(node, 2)
    rows, blocks = (int(d) for d in scales.shape.numpy())
    shape = (rows, _width(node, blocks * _number(node, "block_size", 128)))
    return QuantisedMatrix(node, True, False, shape, _packed(node, (0, 2, 3), shape, 128))


def _packed(node: ir.Node, places: tuple[int, int, int], shape: tuple[int, int], block: int) -> Callable[[], Blocks]:
    codes, scales, zeros = _operands(node, places)
    bits, size = _number(node, "bits", 4), _number(node, "block_size", block)
    offsets, lookup = offsets_of(node), node.op_type == "GatherBlockQuantized"

    def unpack() -> Blocks:
        found = Blocks.packed(codes(), scales(), zeros and zeros(), bits, size, shape)
        added = None if offsets is None else offsets.numpy()
        return dataclasses.replace(found, offsets=added if added is None or lookup else np.ascontiguousarray(added.T))

    return unpack


def _dequantised(node: ir.Node) -> QuantisedMatrix | None:
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
    return QuantisedMatrix(node, lookup, transposed, (rows, columns), unpack)


def _size_of_blocks(columns: int, along: bool, block: int, scales: int) -> int:
    """Number of elements of a row that share a step: a block, one, or all."""
    if scales == 1 or (not along and not block):
        return columns
    return block if along and block else 1


def _integers(node: ir.Node) -> QuantisedMatrix:
    codes, _, zeros = _operands(node, (1, -1, 3))
    rows, columns = (int(d) for d in _tensor(node, 1).shape.numpy())

    def unpack() -> Blocks:
        wide = codes().astype(np.float32) - (0.0 if zeros is None else zeros().astype(np.float32))
        return Blocks(np.ascontiguousarray(wide.T), np.ones((columns, 1), np.float32), rows)

    return QuantisedMatrix(node, False, True, (columns, rows), unpack)


# -- operands ------------------------------------------------------------------------------------------


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
