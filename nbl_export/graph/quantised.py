"""Int4 blocks in standard operators, as TensorRT accepts them.

    before   MatMul(x, W [K, N])
    after    MatMul(x, DequantizeLinear(W4 [K, N] int4, scale [K / block, N]; axis 0, block_size))

Rounding is symmetric, to nearest, along K. Scales have the weight's float type and are positive, because TensorRT's
parser refuses others ("Scale coefficients must all be positive"). A block takes the smallest scale that holds its
largest value (as 7) and its smallest (as -8). TensorRT accepts int4 without zero points and in blocks along K only
(TensorRT documentation, "Working with Quantized Types").
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from nbl_export.graph.emitter import register

__all__ = ["int4_blocks", "quantize_weight"]


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
    wide = ir.val(f"{weight.name}_wide", dtype, dims)
    blocks = {"axis": 0, "block_size": block}
    name = f"{node.name}/DequantizeLinear"
    node.prepend(ir.node("DequantizeLinear", [packed, scale], blocks, outputs=[wide], name=name))
    node.replace_input_with(1, wide)
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
