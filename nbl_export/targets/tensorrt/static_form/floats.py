"""Casts all floats of a graph to another type.

    before   every float tensor, value and cache float32      after   float16 or bfloat16, the same nodes

TensorRT 11 and TensorRT-RTX are strongly typed: the graph decides the precision. The graph before this pass is the
float32 twin (float32 copy) of the graph after it: same nodes, same names, weights rounded once.

The library decides what a kernel accumulates in:

    RMSNormalization    float32, by its stash_type (the default, 1)
    attention in fp16   float16 in fused kernels (release notes of TensorRT 11.3: "FP16 fused attention can accumulate
                        in FP32 when you upcast query, key, and value"); a score beyond 65504 is infinite
    attention in bf16   float32: the tensor cores have no narrower sum for it (PTX ISA, `mma` with .bf16)
    matrix products     what the kernel that the builder chooses accumulates in; float32 for bf16, as above

So a model whose numbers overflow in fp16 is exported in bf16. A weight that overflows is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from nbl_export.errors import NblError, RefusalError

__all__ = ["CastFloats"]

_WIDE = ir.DataType.FLOAT


class CastFloats(ir.passes.InPlacePass):
    """Cast a float32 graph to another float type; refuses a graph that fixes a float type in an attribute."""

    def __init__(self, dtype: ir.DataType) -> None:
        super().__init__()
        self._dtype = dtype

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for node in graph:
            if node.op_type in ("Cast", "CastLike", "Constant", "ConstantOfShape"):
                raise RefusalError(None, f"{node.name} is a {node.op_type}, which may fix a float type")
        values = [v for v in _values(graph) if v.dtype == _WIDE] if self._dtype != _WIDE else []
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


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
