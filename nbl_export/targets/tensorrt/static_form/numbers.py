"""Casts all floats of a graph to another type.

    before   every float tensor, value and cache float32      after   float16 or bfloat16, the same nodes; or back

TensorRT 11 and TensorRT-RTX are strongly typed: the graph decides the precision. Weights are rounded once. A cast back
to float32 gives the copy that a CPU verifies: same nodes, same names, same numbers.

The library decides what a kernel accumulates in:

    RMSNormalization    float32, by its stash_type (the default, 1)
    attention in fp16   float16 in fused kernels (release notes of TensorRT 11.3: "FP16 fused attention can accumulate
                        in FP32 when you upcast query, key, and value"); a score beyond 65504 is infinite
    attention in bf16   float32: the tensor cores have no narrower sum for it (PTX ISA, `mma` with .bf16)
    matrix products     what the kernel that the builder chooses accumulates in; float32 for bf16, as above

So a model whose numbers overflow in fp16 is exported in bf16. A weight that overflows is refused here.

Scales the queries of attention in the graph, so that no kernel scales the keys of the cache.

    before   Attention(q, K, V, ...; scale=s, or 1 / sqrt(head) if absent)
    after    Attention(q * s, K, V, ...; scale=1)

TensorRT's parser multiplies queries and keys by sqrt(scale) each (onnx-tensorrt, `scaleQKTensor` in
AttentionHelpers.cpp). The keys are the whole cache, so a step would read and write all slots of each layer once more.
TensorRT's documentation allows the scale on the queries alone ("Fused Attention").

Turns decoder matrices into int4 blocks behind a DequantizeLinear (drawn in `graph.quantised`).

The embedding and the lm_head stay as they are. Gather reads them too if they are tied, and a coarse head costs more
quality than it saves. TensorRT's documentation names blocks of 64 and 128 for int4, and 64 loses less quality.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nbl_export.errors import NblError, RefusalError
from nbl_export.graph.emitter import Maker, need, size, type_of
from nbl_export.graph.quantised import quantize_weight

__all__ = ["INT4_BLOCK", "BlockInt4", "CastFloats", "ScaledQueries"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class CastFloats(ir.passes.InPlacePass):
    """Cast a graph to another float type; refuses a graph that fixes a float type in an attribute."""

    def __init__(self, dtype: ir.DataType) -> None:
        super().__init__()
        self._dtype = dtype

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for node in graph:
            if node.op_type in ("Cast", "CastLike", "Constant", "ConstantOfShape"):
                raise RefusalError(None, f"{node.name} is a {node.op_type}, which may fix a float type")
        named = ir.convenience.create_value_mapping(graph).values()
        values = [v for v in named if v.dtype in _FLOATS and v.dtype != self._dtype]
        for value in values:
            if value.const_value is not None:
                value.const_value = self._cast(value.const_value)
            value.type = ir.TensorType(self._dtype)  # mobius' parameters have no setter for dtype
        return ir.passes.PassResult(model, bool(values))

    def _cast(self, wide: ir.TensorProtocol) -> ir.TensorProtocol:
        """Cast when the tensor is written, so that memory holds one matrix at a time."""

        def narrow() -> ir.TensorProtocol:
            full = np.asarray(wide.numpy())
            with np.errstate(over="ignore"):
                array = full.astype(self._dtype.numpy())
            if self._dtype == ir.DataType.FLOAT16 and np.isinf(array).any() and np.isfinite(full).all():
                most = f"{np.abs(full).max():.6g}"
                raise NblError(f"{wide.name} has a value of {most}, which float16 cannot hold; use --precision bf16")
            return ir.tensor(array, dtype=self._dtype, name=wide.name)

        return ir.LazyTensor(narrow, dtype=self._dtype, shape=ir.Shape(wide.shape.numpy()), name=wide.name)


class ScaledQueries(ir.passes.InPlacePass):
    """Multiply each query by the attention scale and set the attribute to 1; run after `HeadMajorCaches`."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        make = Maker(model.graph, output="")
        changed = [_scale(make, node) for node in model.graph if node.op_type == "Attention"]
        model.graph.extend(make.nodes)
        return ir.passes.PassResult(model, any(changed))


def _scale(make: Maker, node: ir.Node) -> bool:
    """Move the scale of one Attention to its query; False if its scale is 1 already."""
    query, key = (need(v, f"query and keys of {node.name}") for v in node.inputs[:2])
    scale = node.attributes.get_float("scale", size(key, 3) ** -0.5)
    if scale == 1.0:
        return False
    factor = make.constant(f"query_scale_{scale:.9g}", scale, ir.DataType.FLOAT)
    node.replace_input_with(0, make("Mul", f"{query.name}/scaled", query, factor, dtype=type_of(key)))
    node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
    return True


INT4_BLOCK = 64
_KEPT = "lm_head"


class BlockInt4(ir.passes.InPlacePass):
    """Quantise every MatMul weight that divides into blocks along K, except the lm_head's."""

    def __init__(self, block: int = INT4_BLOCK) -> None:
        super().__init__()
        self._block = block

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        matrices = [n for n in model.graph if n.op_type == "MatMul" and not _is_head(n)]
        done = [node for node in matrices if quantize_weight(model.graph, node, self._block)]
        return ir.passes.PassResult(model, bool(done))


def _is_head(node: ir.Node) -> bool:
    weight = node.inputs[1]
    return _KEPT in (node.name or "") or (weight is not None and _KEPT in (weight.name or ""))
