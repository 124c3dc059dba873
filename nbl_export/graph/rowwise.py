"""A product with int8 activations: one scale a token, one scale an output channel.

    RowwiseMatMul(x, inverse, codes, scales, step, zero), a function of the model, which ONNX Runtime inlines

    x ─ Mul(inverse) ─┬─────────────────────────── Div ─ QuantizeLinear(step, zero) ─ MatMulIntegerToFloat ─ Mul ─ y
                      └ Abs ─ ReduceMax ─ Max ─────┴──────────────────────────────────────────────────────────┘
    exact:  x ─ Mul(inverse) ─ MatMul(DequantizeLinear(codes, scales)) ─ y

x is [B, T, K], codes int8 [K, N], scales float32 [N]. `inverse` [K] divides each channel by its balance, by which
the rows of the codes are multiplied (`graph.passes.rowwise`). All functions of a graph share step 1 / 127 and zero 128.
Two products of one input then have equal nodes up to the codes, and ONNX Runtime computes these nodes once.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["DOMAIN", "NAME", "STEP", "ZERO", "make_exact", "rowwise_function", "session_entries"]

NAME = "RowwiseMatMul"
DOMAIN = "nbl_export"
STEP = np.float32(1 / 127)
ZERO = np.uint8(128)
_CODES = 2  # place among the inputs
_X64 = ("x86_64", "amd64")
_UNSIGNED = {"session.x64quantprecision": "1"}  # onnxruntime_session_options_config_keys.h
_HEAD = f'''<domain: "{DOMAIN}", opset_import: ["": %d, "com.microsoft": 1]>
{NAME} (x, inverse, codes, scales, step, zero) => (y)'''
# `least`: a row of zeros stays zero.
_SHIPPED = """{
  least = Constant <value = float {1e-20}> ()
  channels = Constant <value = int64[1] {-1}> ()
  balanced = Mul (x, inverse)
  sizes = Abs (balanced)
  largest = ReduceMax <keepdims = 1> (sizes, channels)
  size = Max (largest, least)
  unit = Div (balanced, size)
  rows = QuantizeLinear (unit, step, zero)
  product = com.microsoft.MatMulIntegerToFloat (rows, codes, step, scales, zero)
  y = Mul (product, size)
}"""
_EXACT = """{
  balanced = Mul (x, inverse)
  weights = DequantizeLinear <axis = 1> (codes, scales)
  y = MatMul (balanced, weights)
}"""


def rowwise_function(opset: int, *, exact: bool = False) -> Any:
    """The function as a protobuf message.

    Args:
        opset: of the graph; ONNX Runtime refuses a function of another one.
        exact: rounds no activations.
    """
    from onnx import parser

    return parser.parse_function(_HEAD % opset + (_EXACT if exact else _SHIPPED))


def make_exact(proto: Any) -> list[Any]:
    """Make the function of a protobuf model round no activations; returns the codes of its products.

    The nodes of the graph stay. ONNX Runtime computes the dequantised matrices once, when it loads the graph, if
    `session.disable_quant_qdq` is set; else at each run.
    """
    for function in proto.functions:
        if (function.domain, function.name) == (DOMAIN, NAME):
            (opset,) = (entry.version for entry in function.opset_import if not entry.domain)
            function.CopyFrom(rowwise_function(opset, exact=True))
    codes = {node.input[_CODES] for node in proto.graph.node if node.op_type == NAME}
    return [tensor for tensor in proto.graph.initializer if tensor.name in codes]


def session_entries(proto: Any) -> dict[str, str]:
    """Entries of a session's configuration that a protobuf model needs on this processor.

    Without VNNI, ONNX Runtime adds pairs of products of uint8 and int8 in 16 bits on x64, which saturate. The entry
    makes both unsigned. With VNNI it only costs, about a third of the time of a prompt.
    """
    is_ours = any((function.domain, function.name) == (DOMAIN, NAME) for function in proto.functions)
    return dict(_UNSIGNED) if is_ours and _saturates() else {}


def _saturates() -> bool:
    """Whether this is an x64 processor that is not known to have VNNI."""
    if platform.machine().lower() not in _X64:
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return True
