"""Feed a replaced layer's residual join with x W' + b in place of its attention (x: what the tap names).

    before   x -- norm -- qkv -- GroupQueryAttention -- o_proj -+      after   x -- MatMul(W') -- Add(b) -+
             x -------------------------------------------- join                x -------------------- join

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

__all__ = ["BypassAttention", "map_names"]


def map_names(layer: int) -> tuple[str, str]:
    """Initializer names of a layer's map: the weight [D, D] as MatMul takes it (transposed), the bias [D]."""
    return f"nbl.layers.{layer}.weight", f"nbl.layers.{layer}.bias"


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
            dtype = block.residual.dtype or _float_type(model.graph)
            weight_name, bias_name = map_names(block.layer)
            weight = _initializer(model.graph, weight_name, np.ascontiguousarray(affine.weight.T), dtype)
            bias = _initializer(model.graph, bias_name, affine.bias, dtype)
            prefix = f"/nbl/layers.{block.layer}"
            product = ir.node("MatMul", [_tapped(block, self.tap), weight], name=f"{prefix}/MatMul")
            total = ir.node("Add", [product.outputs[0], bias], name=f"{prefix}/Add")
            _name_outputs(block.residual, dtype, product, total)
            model.graph.insert_before(block.join, [product, total])
            _check_same_size(block.layer, block.join.inputs[block.branch_index], affine)
            block.join.replace_input_with(block.branch_index, total.outputs[0])
        return ir.passes.PassResult(model, modified=bool(blocks))


def _tapped(block: AttentionBlock, tap: str) -> ir.Value:
    if tap == "residual":
        return block.residual
    if block.normed is None:
        raise RefusalError(block.layer, "its norm is not one operator, so the map cannot be put behind it (tap normed)")
    return block.normed


def _initializer(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
    if name in graph.initializers:
        raise RefusalError(None, f"it already has an initializer {name}; this graph has been rewritten before")
    tensor = ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(dtype))
    graph.register_initializer(value)
    return value


def _name_outputs(residual: ir.Value, dtype: ir.DataType, *nodes: ir.Node) -> None:
    for node in nodes:
        node.outputs[0].name = f"{node.name}/output_0"
        node.outputs[0].shape = residual.shape
        node.outputs[0].type = ir.TensorType(dtype)


def _float_type(graph: ir.Graph) -> ir.DataType:
    """Element type of the logits, for graphs that do not state the type of their hidden values."""
    return graph.outputs[0].dtype or ir.DataType.FLOAT


def _check_same_size(layer: int, branch: ir.Value | None, affine: AffineMap) -> None:
    width = branch.shape[-1] if branch is not None and branch.shape is not None else None
    if isinstance(width, int) and width != affine.weight.shape[0]:
        raise RefusalError(layer, f"its attention output is {width} wide, the map {affine.weight.shape[0]}")
