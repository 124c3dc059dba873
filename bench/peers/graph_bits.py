"""Bits that an ONNX graph spends on a weight of the matrices it multiplies with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

_BITS = {1: 32, 10: 16, 16: 16, 2: 8, 3: 8, 6: 32, 7: 64, 11: 64, 21: 4, 22: 4}  # TensorProto element types


def bits_of_graph(path: Path) -> tuple[int, float]:
    """Nominal bits of most weights, and bits for each weight with scales and zero points.

    Matrices are the constant operands of MatMul, Gemm and MatMulNBits (a transposed one counts once); an embedding
    table that is only looked up in is none.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    constants = {t.name: t for t in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    total, elements = 0, 0
    seen: dict[int, int] = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            sizes = {a.name: a.i for a in node.attribute}
            count, bits = sizes["K"] * sizes["N"], sizes["bits"]
            total += sum(_size_bits(constants[name]) for name in node.input[1:] if name in constants)
        elif node.op_type in ("MatMul", "Gemm") and (weight := _constant(node.input[1], constants, made)) is not None:
            count, bits = math.prod(weight.dims), _BITS[weight.data_type]
            total += count * bits
        else:
            continue
        elements += count
        seen[bits] = seen.get(bits, 0) + count
    return max(seen, key=lambda bits: seen[bits]), total / elements


def _constant(name: str, constants: dict[str, Any], made: dict[str, Any]) -> Any:
    while name in made and made[name].op_type in ("Transpose", "Cast", "DequantizeLinear"):
        name = made[name].input[0]
    return constants.get(name)


def _size_bits(tensor: Any) -> int:
    return math.prod(tensor.dims) * _BITS[tensor.data_type]
