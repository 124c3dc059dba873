"""Matrices that a graph stores in codes: integers with scales, possibly with zero points and with an offset a block.

    MatMulNBits(x, codes, scales[, zeros])            y = x W'      W [N, K], blocks along K
    GatherBlockQuantized(codes, ids, scales[, zeros])  rows of W     W [V, D], blocks along D
    DequantizeLinear(codes, scales[, zeros])           either        for the whole tensor, an axis, or in blocks
    MatMulInteger(x, codes[, ., zeros])                y = x W'      W without its scale, which a later node applies
    QMoE(x, scores, codes, scales, ...)                experts       W of all experts, one below the other, twice

`read` refuses codes that are computed, codes sorted by activation (g_idx), and codes dequantised to a type other than
float32.

Offsets are other nodes, W = coded + offset:

    x -+------------------------------- MatMulNBits(codes, scales) -- Add --   x W'
       +- Reshape -- ReduceSum -- MatMul(offsets [K / size, N]) ------'

    ids -+- GatherBlockQuantized(codes, scales) -- Reshape -- Add -- Reshape --   W[ids]
         +- Gather(offsets [V, K / size]) -- Unsqueeze ------'

The sum of a block of x times the block's offset is the offset's part of the product. Floating-point zero points would
compute the same, on a kernel that is 20 to 50 times slower for one token (ONNX Runtime 1.32, CPU). One sum of blocks
serves all products that read the same x.

TensorRT accepts int4 blocks in standard operators:

    before   MatMul(x, W [K, N])
    after    MatMul(x, DequantizeLinear(W4 [K, N] int4, scale [K / block, N]; axis 0, block_size))

Rounding is symmetric, to nearest, along K. Scales have the weight's float type and are positive, because TensorRT's
parser refuses others ("Scale coefficients must all be positive"). A block takes the smallest scale that holds its
largest value (as 7) and its smallest (as -8). TensorRT accepts int4 without zero points and in blocks along K only
(TensorRT documentation, "Working with Quantized Types").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.emitter import add_initializer, new_node, register
from nbl_export.graph.files import read_graph
from nbl_export.records.quantised import Blocks, StoredMatrix, unpacked

__all__ = [
    "HOLDERS",
    "add_lookup_offsets",
    "add_product_offsets",
    "expert_matrices",
    "int4_blocks",
    "is_block_sum",
    "offsets_of",
    "quantised_matrices",
    "quantize_weight",
    "read",
    "reads_block_sums",
    "stored_matrices",
]

_UNKNOWN = ("MatMulBnb4", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulFpQ4")
_KEPT_DIMS = (0, 0)  # a Reshape keeps the dimensions of batch and tokens

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
        found[node] = tuple(_experts(node, place, f"{node.name}/fc{1 + k}") for k, place in enumerate((_FIRST, 5)))
    return found


_FIRST = 2  # input of a QMoE: codes of the first product


def _experts(node: ir.Node, place: int, name: str) -> StoredMatrix:
    codes, scales, _ = _operands(node, (place, place + 1, len(node.inputs)))
    bits = _number(node, "expert_weight_bits", 4)
    experts, rows, packed = (int(d) for d in _tensor(node, place).shape.numpy())
    shape = (experts * rows, packed * 8 // bits)
    size = _number(node, "block_size", 0) or shape[1]
    pairs = experts if place == _FIRST and _number(node, "swiglu_fusion", 0) == 1 else 0
    blocks = lambda: unpacked(codes(), scales(), None, bits, size, shape)  # noqa: E731
    return StoredMatrix(name, False, blocks, shape, alternating=pairs)


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
    offsets, lookup = offsets_of(node), node.op_type == "GatherBlockQuantized"

    def unpack() -> Blocks:
        found = unpacked(codes(), scales(), zeros and zeros(), bits, size, shape)
        added = None if offsets is None else offsets.numpy()
        return dataclasses.replace(found, offsets=added if added is None or lookup else np.ascontiguousarray(added.T))

    return unpack


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


# -- offsets ------------------------------------------------------------------------------------------


def is_block_sum(node: ir.Node) -> bool:
    """Whether a node begins the sums of blocks, a part of a product."""
    users = list(node.outputs[0].consumers())
    return node.op_type == "Reshape" and len(users) == 1 and users[0].op_type == "ReduceSum"


def reads_block_sums(node: ir.Node) -> bool:
    """Whether a product has offsets as its matrix, which belong to the matrix of another product."""
    maker = None if not node.inputs or node.inputs[0] is None else node.inputs[0].producer()
    return maker is not None and maker.op_type == "ReduceSum"


def add_product_offsets(graph: ir.Graph, product: ir.Node, offsets_NB: np.ndarray, name: str) -> list[ir.Node]:
    """The nodes that add x's block sums times the offsets to a product; the last one gives the sum.

    Args:
        product: MatMulNBits or MatMul of x [B, T, K]; its output is read by the new nodes.
        offsets_NB: [N, K / size] float32, stored transposed as `name`.
    """
    x = product.inputs[0]
    assert x is not None
    stored = add_initializer(graph, name, np.ascontiguousarray(offsets_NB.T), ir.DataType.FLOAT)
    sums, made = _block_sums(graph, x, offsets_NB.shape[1], product)
    output = product.outputs[0]
    part = new_node("MatMul", [sums, stored], f"{product.name}/offsets", output.dtype, output.shape)
    whole = new_node("Add", [output, part.outputs[0]], f"{product.name}/Add", output.dtype, output.shape)
    return [*made, part, whole]


def _block_sums(graph: ir.Graph, x: ir.Value, blocks: int, product: ir.Node) -> tuple[ir.Value, list[ir.Node]]:
    """Sums of x's blocks [B, T, blocks], and the nodes that make them: none if another product has them already."""
    for user in x.consumers():
        if is_block_sum(user):
            node = next(iter(user.outputs[0].consumers()))
            if node.outputs[0].shape is not None and node.outputs[0].shape[-1] == blocks:
                return node.outputs[0], []
    shape = _numbers(graph, f"nbl.block_sums.{blocks}.shape", [*_KEPT_DIMS, blocks, -1])
    dims = ["b", "t"] if x.shape is None else list(x.shape[:-1])
    kind, axis = ir.DataType.FLOAT, _numbers(graph, "nbl.block_sums.axes", [-1])
    split = new_node("Reshape", [x, shape], f"{product.name}/blocks", kind, ir.Shape([*dims, blocks, None]))
    sums, named = ir.Shape([*dims, blocks]), f"{product.name}/block_sums"
    total = new_node("ReduceSum", [split.outputs[0], axis], named, kind, sums, {"keepdims": 0})
    return total.outputs[0], [split, total]


def add_lookup_offsets(graph: ir.Graph, lookup: ir.Node, offsets_VB: np.ndarray, name: str) -> list[ir.Node]:
    """The nodes that add each looked-up row's offsets to the row; the last one gives the sum.

    Args:
        lookup: GatherBlockQuantized by ids [B, T]. offsets_VB: [V, K / size] float32, stored as `name`.
    """
    stored = add_initializer(graph, name, offsets_VB, ir.DataType.FLOAT)
    blocks, output = offsets_VB.shape[1], lookup.outputs[0]
    width = output.shape[-1] if output.shape is not None else -1
    split = _numbers(graph, f"nbl.block_sums.{blocks}.shape", [*_KEPT_DIMS, blocks, -1])
    joined = _numbers(graph, "nbl.block_sums.joined", [*_KEPT_DIMS, int(width) if isinstance(width, int) else -1])
    axis = _numbers(graph, "nbl.block_sums.axes", [-1])
    kind = ir.DataType.FLOAT
    rows = new_node("Gather", [stored, lookup.inputs[1]], f"{lookup.name}/offsets", kind, None, {"axis": 0})
    thin = new_node("Unsqueeze", [rows.outputs[0], axis], f"{lookup.name}/Unsqueeze", kind)
    coded = new_node("Reshape", [output, split], f"{lookup.name}/blocks", kind)
    added = new_node("Add", [coded.outputs[0], thin.outputs[0]], f"{lookup.name}/Add", kind)
    whole = new_node("Reshape", [added.outputs[0], joined], f"{lookup.name}/joined", kind, output.shape)
    return [rows, thin, coded, added, whole]


def offsets_of(node: ir.Node) -> ir.TensorProtocol | None:
    """The offsets that are added to the output of a product ([K / size, N]) or a lookup ([V, K / size]), or None."""
    users = list(node.outputs[0].consumers())
    if len(users) != 1:
        return None
    if users[0].op_type == "Reshape":
        users = list(users[0].outputs[0].consumers())
        other = _other(users, "Unsqueeze")
        return None if other is None else _stored(other.inputs[0], "Gather", 0)
    other = _other(users, "MatMul")
    return None if other is None or not reads_block_sums(other) else _const(other.inputs[1])


def _other(users: list[ir.Node], op_type: str) -> ir.Node | None:
    """The maker of the second operand of the only user, an Add, if it is of a type."""
    if len(users) != 1 or users[0].op_type != "Add" or users[0].inputs[1] is None:
        return None
    maker = users[0].inputs[1].producer()
    return maker if maker is not None and maker.op_type == op_type else None


def _stored(value: ir.Value | None, op_type: str, place: int) -> ir.TensorProtocol | None:
    maker = None if value is None else value.producer()
    return None if maker is None or maker.op_type != op_type else _const(maker.inputs[place])


def _const(value: ir.Value | None) -> ir.TensorProtocol | None:
    return None if value is None else value.const_value


def _numbers(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    """A constant of int64; the same name returns the same value."""
    if name in graph.initializers:
        return graph.initializers[name]
    return register(graph, ir.tensor(np.array(numbers, np.int64), name=name))


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
