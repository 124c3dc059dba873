"""Quantises the maps of an NBL graph to int4 blocks like the graph's other matrices.

    before   MatMul(x, W')      after   MatMul(x, DequantizeLinear(W4', scale; axis 0, block_size))

The block size comes from the graph's own int4 matrices; a graph without int4 matrices does not change.
`graph.coded.int4_blocks` makes the blocks. `quantize.QuantizeMaps` does the same for MatMulNBits.
"""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from nbl_export.graph.coded.int4_blocks import quantize_weight

__all__ = ["QuantizeMapBlocks"]

_PREFIX = "/nbl/layers."


class QuantizeMapBlocks(ir.passes.InPlacePass):
    """Quantise the MatMul of each bypass if the graph's other matrices are int4 blocks; else do nothing."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        block = _block_of(model.graph)
        maps = [n for n in model.graph if n.op_type == "MatMul" and (n.name or "").startswith(_PREFIX)]
        done = [] if block is None else [node for node in maps if quantize_weight(model.graph, node, block)]
        return ir.passes.PassResult(model, modified=bool(done))


def _block_of(graph: ir.Graph) -> int | None:
    """The most common block size of int4 matrices that a MatMul reads."""
    seen = Counter(
        node.attributes["block_size"].as_int()
        for node in graph
        if node.op_type == "DequantizeLinear"
        and "block_size" in node.attributes
        and node.inputs[0] is not None
        and node.inputs[0].dtype == ir.DataType.INT4
        and any(user.op_type == "MatMul" for user in node.outputs[0].consumers())
    )
    return seen.most_common(1)[0][0] if seen else None
