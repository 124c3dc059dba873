"""Writes products with, and lookups in, matrices in codes.

    MatMulNBits(x, codes, scales[, zero points]) [-- Add(block sums of x times offsets)]
    GatherBlockQuantized(codes, ids, scales[, zero points]) [-- Add(offsets of the rows)]

A matrix that two nodes read, as a tied head, is stored once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from nbl_export.graph.coded.block_sums import add_lookup_offsets, add_product_offsets
from nbl_export.graph.emitter import add_initializer
from nbl_export.records.block_codes import BlockCodes

__all__ = ["lookup_nodes", "product_nodes", "put"]


def product_nodes(
    graph: ir.Graph, node: ir.Node, name: str, title: str, part: BlockCodes, accuracy: int
) -> list[ir.Node]:
    """Nodes of x W', for the x and beside the output of a MatMul; the last node gives the product.

    Args:
        name, title: begin the names of constants and of nodes. accuracy: `accuracy_level`.
    """
    (rows, columns), old = part.codes.shape, node.outputs[0]
    inputs = [node.inputs[0], *_operands(graph, name, part)]
    attributes = {"K": columns, "N": rows, "bits": part.bits, "block_size": part.size, "accuracy_level": accuracy}
    product = ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft", name=title)
    new = product.outputs[0]
    new.name, new.type = f"{title}/output_0", ir.TensorType(ir.DataType.FLOAT)
    new.shape = None if old.shape is None else ir.Shape([*old.shape[:-1], rows])
    if part.offsets is None:
        return [product]
    return [product, *add_product_offsets(graph, product, part.offsets, f"{name}_offsets")]


def lookup_nodes(graph: ir.Graph, node: ir.Node, name: str, part: BlockCodes) -> list[ir.Node]:
    """Nodes of W[ids], for the ids and beside the output of a Gather; the last node gives the rows."""
    codes, *others = _operands(graph, name, part)
    shape = _once(graph, f"{name}_Q{part.bits}.rows", lambda: np.array([len(part.codes), -1], np.int64))
    flat = ir.node("Reshape", [codes, shape], name=f"{node.name}/rows")
    flat.outputs[0].name, flat.outputs[0].type = f"{flat.name}/output_0", ir.TensorType(ir.DataType.UINT8)
    attributes = {"bits": part.bits, "block_size": part.size, "gather_axis": 0, "quantize_axis": 1}
    inputs = [flat.outputs[0], node.inputs[1], *others]
    lookup = ir.node("GatherBlockQuantized", inputs, attributes, domain="com.microsoft", name=f"{node.name}_Q")
    new = lookup.outputs[0]
    new.name, new.type, new.shape = f"{lookup.name}/output_0", node.outputs[0].type, node.outputs[0].shape
    if part.offsets is None:
        return [flat, lookup]
    return [flat, lookup, *add_lookup_offsets(graph, lookup, part.offsets, f"{name}_row_offsets")]


def put(graph: ir.Graph, node: ir.Node, made: list[ir.Node]) -> None:
    """Put nodes in place of one; the last one's output takes over the name."""
    old, new = node.outputs[0], made[-1].outputs[0]
    new.type, new.shape, name = ir.TensorType(ir.DataType.FLOAT), old.shape, old.name
    graph.insert_before(node, made)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    new.name = name


def _operands(graph: ir.Graph, name: str, part: BlockCodes) -> list[ir.Value]:
    """Codes, scales, and zero points if they are not the middle of the codes' range."""
    rows, blocks = part.scales.shape
    found = [_once(graph, f"{name}_Q{part.bits}", lambda: part.packed)]
    found.append(_once(graph, f"{name}_scales", lambda: part.scales))
    if part.zero == 0:
        found.append(_once(graph, f"{name}_zeros", lambda: np.zeros((rows, -(-blocks * part.bits // 8)), np.uint8)))
    return found


def _once(graph: ir.Graph, name: str, make: Callable[[], np.ndarray]) -> ir.Value:
    """The constant of a name, made if the graph lacks it."""
    if name in graph.initializers:
        return graph.initializers[name]
    array = make()
    return add_initializer(graph, name, array, ir.DataType.from_numpy(array.dtype))
