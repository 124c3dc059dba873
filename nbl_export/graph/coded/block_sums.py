"""Products with matrices in codes that also have an offset a block, W = coded + offset.

    x -+------------------------------- MatMulNBits(codes, scales) -- Add --   x W'
       +- Reshape -- ReduceSum -- MatMul(offsets [K / size, N]) ------'

    ids -+- GatherBlockQuantized(codes, scales) -- Reshape -- Add -- Reshape --   W[ids]
         +- Gather(offsets [V, K / size]) -- Unsqueeze ------'

The sum of a block of x times the block's offset is the offset's part of the product. Floating-point zero points would
compute the same, on a kernel that is 20 to 50 times slower for one token (ONNX Runtime 1.32, CPU). One sum of blocks
serves all products that read the same x.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nbl_export.graph.emitter import add_initializer, register

__all__ = ["add_lookup_offsets", "add_product_offsets", "is_block_sum", "offsets_of", "reads_block_sums"]

_KEPT = (0, 0)  # a Reshape keeps the dimensions of batch and tokens


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
    part = ir.node("MatMul", [sums, stored], name=f"{product.name}/offsets")
    whole = ir.node("Add", [product.outputs[0], part.outputs[0]], name=f"{product.name}/Add")
    for node in (part, whole):
        node.outputs[0].name = f"{node.name}/output_0"
        node.outputs[0].type, node.outputs[0].shape = product.outputs[0].type, product.outputs[0].shape
    return [*made, part, whole]


def _block_sums(graph: ir.Graph, x: ir.Value, blocks: int, product: ir.Node) -> tuple[ir.Value, list[ir.Node]]:
    """Sums of x's blocks [B, T, blocks], and the nodes that make them: none if another product has them already."""
    for user in x.consumers():
        if is_block_sum(user):
            node = next(iter(user.outputs[0].consumers()))
            if node.outputs[0].shape is not None and node.outputs[0].shape[-1] == blocks:
                return node.outputs[0], []
    shape = _numbers(graph, f"nbl.block_sums.{blocks}.shape", [*_KEPT, blocks, -1])
    split = ir.node("Reshape", [x, shape], name=f"{product.name}/blocks")
    total = ir.node("ReduceSum", [split.outputs[0], _numbers(graph, "nbl.block_sums.axes", [-1])], {"keepdims": 0},
                    name=f"{product.name}/block_sums")  # fmt: skip
    dims = ["b", "t"] if x.shape is None else list(x.shape[:-1])
    for node, last in ((split, [blocks, None]), (total, [blocks])):
        node.outputs[0].name, node.outputs[0].type = f"{node.name}/output_0", ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape([*dims, *last])
    return total.outputs[0], [split, total]


def add_lookup_offsets(graph: ir.Graph, lookup: ir.Node, offsets_VB: np.ndarray, name: str) -> list[ir.Node]:
    """The nodes that add each looked-up row's offsets to the row; the last one gives the sum.

    Args:
        lookup: GatherBlockQuantized by ids [B, T]. offsets_VB: [V, K / size] float32, stored as `name`.
    """
    stored = add_initializer(graph, name, offsets_VB, ir.DataType.FLOAT)
    blocks, output = offsets_VB.shape[1], lookup.outputs[0]
    width = output.shape[-1] if output.shape is not None else -1
    split = _numbers(graph, f"nbl.block_sums.{blocks}.shape", [*_KEPT, blocks, -1])
    joined = _numbers(graph, "nbl.block_sums.joined", [*_KEPT, int(width) if isinstance(width, int) else -1])
    axis = _numbers(graph, "nbl.block_sums.axes", [-1])
    rows = ir.node("Gather", [stored, lookup.inputs[1]], {"axis": 0}, name=f"{lookup.name}/offsets")
    thin = ir.node("Unsqueeze", [rows.outputs[0], axis], name=f"{lookup.name}/Unsqueeze")
    coded = ir.node("Reshape", [output, split], name=f"{lookup.name}/blocks")
    added = ir.node("Add", [coded.outputs[0], thin.outputs[0]], name=f"{lookup.name}/Add")
    whole = ir.node("Reshape", [added.outputs[0], joined], name=f"{lookup.name}/joined")
    nodes = [rows, thin, coded, added, whole]
    for node in nodes:
        node.outputs[0].name, node.outputs[0].type = f"{node.name}/output_0", ir.TensorType(ir.DataType.FLOAT)
    whole.outputs[0].shape = output.shape
    return nodes


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
