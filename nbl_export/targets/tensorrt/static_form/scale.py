"""Scales the queries of attention in the graph, so that no kernel scales the keys of the cache.

    before   Attention(q, K, V, ...; scale=s, or 1 / sqrt(head) if absent)
    after    Attention(q * s, K, V, ...; scale=1)

TensorRT's parser multiplies queries and keys by sqrt(scale) each (onnx-tensorrt, `scaleQKTensor` in
AttentionHelpers.cpp). The keys are the whole cache, so a step would read and write all slots of each layer once more.
TensorRT's documentation allows the scale on the queries alone ("Fused Attention"). The parser's products with sqrt(1)
are bypassed when an engine is built (`targets.tensorrt.network`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nbl_export.graph.emitter import Emitter, need, size, type_of

__all__ = ["ScaledQueries"]


class ScaledQueries(ir.passes.InPlacePass):
    """Multiply each query by the attention scale and set the attribute to 1; run after `HeadMajorCaches`."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        emit = Emitter(model.graph)
        changed = [_scale(emit, node) for node in model.graph if node.op_type == "Attention"]
        return ir.passes.PassResult(model, any(changed))


def _scale(emit: Emitter, node: ir.Node) -> bool:
    """Move the scale of one Attention to its query; False if its scale is 1 already."""
    query, key = (need(v, f"query and keys of {node.name}") for v in node.inputs[:2])
    scale = node.attributes.get_float("scale", size(key, 3) ** -0.5)
    if scale == 1.0:
        return False
    factor = emit.constant(f"query_scale_{scale:.9g}", np.array(scale, np.float32))
    node.replace_input_with(0, emit("Mul", query, factor, name=f"{query.name}/scaled", dtype=type_of(key)))
    node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
    return True
