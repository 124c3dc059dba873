"""Feed a replaced layer's residual join with x W' + b in place of its attention (x: what the tap names).

    before   x -- norm -- qkv -- GroupQueryAttention -- o_proj -+      after   x -- MatMul(W') -- Add(b) -+
             x -------------------------------------------- join                x -------------------- join

A map of low rank is two products, MatMul(down') -- MatMul(up') -- Add(b).
Nothing is cut out: exporters share rotary tables, masks and shape values across layers, so the old block is
merely left without a reader (see `caches` and `sweep`). Refuses a join that `anatomy` cannot find.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.records import AffineMap
from nbl_export.rewrite.anatomy import AttentionBlock, find_block

__all__ = ["BypassAttention", "add_initializer", "element_type", "tapped"]

_DEPTH = 12  # of operators between a value and one of a stated type
_PRODUCTS = {"weight": "MatMul", "down": "MatMulDown", "up": "MatMulUp"}  # matrix of a map -> its node


class BypassAttention(ir.passes.InPlacePass):
    """Put affine maps in place of the attention of the mapped layers."""

    def __init__(self, maps: Mapping[int, AffineMap], tap: str = "residual") -> None:
        super().__init__()
        self.maps = maps
        self.tap = tap

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        blocks = [find_block(model.graph, layer) for layer in sorted(self.maps)]
        for block in blocks:
            affine = self.maps[block.layer]
            dtype = element_type(model.graph, block.residual)
            nodes = _map_nodes(model.graph, block, affine, tapped(block, self.tap), dtype)
            model.graph.insert_before(block.join, nodes)
            _check_same_size(block.layer, block.join.inputs[block.branch_index], affine)
            block.join.replace_input_with(block.branch_index, nodes[-1].outputs[0])
        return ir.passes.PassResult(model, modified=bool(blocks))


def _map_nodes(
    graph: ir.Graph, block: AttentionBlock, affine: AffineMap, tapped: ir.Value, dtype: ir.DataType
) -> list[ir.Node]:
    """The products of a map and the addition of its bias; matrices are stored transposed, as MatMul takes them."""
    prefix, names = f"/nbl/layers.{block.layer}", f"nbl.layers.{block.layer}"
    nodes, value = [], tapped
    for name, matrix in affine.matrices.items():
        weight = add_initializer(graph, f"{names}.{name}", np.ascontiguousarray(matrix.T), dtype)
        nodes.append(ir.node("MatMul", [value, weight], name=f"{prefix}/{_PRODUCTS[name]}"))
        value = _describe_output(nodes[-1], block.residual, matrix.shape[0], dtype)
    bias = add_initializer(graph, f"{names}.bias", affine.bias, dtype)
    nodes.append(ir.node("Add", [value, bias], name=f"{prefix}/Add"))
    _describe_output(nodes[-1], block.residual, affine.bias.shape[0], dtype)
    return nodes


def tapped(block: AttentionBlock, tap: str) -> ir.Value:
    """What a map acts on.

    Raises:
        RefusalError: the block has no normed input.
    """
    if tap == "residual":
        return block.residual
    if block.normed is None:
        raise RefusalError(
            block.layer,
            "no norm makes the one value that its attention multiplies first, for a map to act on (tap normed)",
        )
    return block.normed


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
    """A new constant.

    Raises:
        RefusalError: there is one of this name.
    """
    if name in graph.initializers:
        raise RefusalError(None, f"it already has an initializer {name}; this graph has been rewritten before")
    tensor = ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(dtype))
    graph.register_initializer(value)
    return value


def _describe_output(node: ir.Node, residual: ir.Value, width: int, dtype: ir.DataType) -> ir.Value:
    """Name and type a node's output; its shape is that of the residual, with its own width."""
    output = node.outputs[0]
    output.name, output.type = f"{node.name}/output_0", ir.TensorType(dtype)
    output.shape = None if residual.shape is None else ir.Shape([*residual.shape[:-1], width])
    return output


def element_type(graph: ir.Graph, value: ir.Value) -> ir.DataType:
    """Of a hidden value, from what it is computed from where the graph does not state it; else that of the logits."""
    return _derived_type(value, _DEPTH) or graph.outputs[0].dtype or ir.DataType.FLOAT


def _derived_type(value: ir.Value, depth: int) -> ir.DataType | None:
    if value.dtype is not None:
        return value.dtype if value.dtype.is_floating_point() else None
    node = value.producer()
    if node is None or depth == 0:
        return None
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    types = (_derived_type(v, depth - 1) for v in node.inputs if v is not None)
    return next((t for t in types if t is not None), None)


def _check_same_size(layer: int, branch: ir.Value | None, affine: AffineMap) -> None:
    width = branch.shape[-1] if branch is not None and branch.shape is not None else None
    if isinstance(width, int) and width != affine.weight.shape[0]:
        raise RefusalError(layer, f"its attention output is {width} wide, the map {affine.weight.shape[0]}")
