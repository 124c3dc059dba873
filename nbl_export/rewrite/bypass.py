"""Feeds a replaced layer's residual join with x W' + b instead of its attention; the tap names the value x.

    before   x -- norm -- qkv -- GroupQueryAttention -- o_proj -+      after   x -- MatMul(W') -- Add(b) -+
             x -------------------------------------------- join                x -------------------- join

A map of low rank is two products: MatMul(down') -- MatMul(up') -- Add(b). A map without a bias has no Add.
This pass removes no nodes, because exporters share rotary tables, masks and shape values across layers. The old block
only loses its reader (see `drop_caches` and `sweep`). Refuses a join that `anatomy` cannot find.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import AttentionBlock, find_block
from nbl_export.graph.emitter import add_initializer, element_type
from nbl_export.records.plan import AffineMap

__all__ = ["BypassAttention", "tapped"]

_PRODUCTS = {"weight": "MatMul", "down": "MatMulDown", "up": "MatMulUp"}  # matrix of a map -> its node


class BypassAttention(ir.passes.InPlacePass):
    """Replace the attention of the mapped layers by affine maps."""

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
    if not affine.has_bias:
        return nodes
    bias = add_initializer(graph, f"{names}.bias", affine.bias, dtype)
    nodes.append(ir.node("Add", [value, bias], name=f"{prefix}/Add"))
    _describe_output(nodes[-1], block.residual, affine.bias.shape[0], dtype)
    return nodes


def tapped(block: AttentionBlock, tap: str) -> ir.Value:
    """The value that a map acts on.

    Raises:
        RefusalError: the tap is "normed" and the block has no normed input.
    """
    if tap == "residual":
        return block.residual
    if block.normed is None:
        raise RefusalError(
            block.layer,
            "its attention does not multiply one normed value first, which tap normed needs; use tap residual",
        )
    return block.normed


def _describe_output(node: ir.Node, residual: ir.Value, width: int, dtype: ir.DataType) -> ir.Value:
    """Name and type a node's output; its shape is the residual's, with `width` as the last dimension."""
    output = node.outputs[0]
    output.name, output.type = f"{node.name}/output_0", ir.TensorType(dtype)
    output.shape = None if residual.shape is None else ir.Shape([*residual.shape[:-1], width])
    return output


def _check_same_size(layer: int, branch: ir.Value | None, affine: AffineMap) -> None:
    width = branch.shape[-1] if branch is not None and branch.shape is not None else None
    if isinstance(width, int) and width != affine.weight.shape[0]:
        raise RefusalError(layer, f"its attention output is {width} wide, the map {affine.weight.shape[0]}")
