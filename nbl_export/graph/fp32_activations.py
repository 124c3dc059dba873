"""A graph with the same matrices in codes, whose products do not round activations to 8 bits.

    MatMulNBits, accuracy_level 4 ─┬─ 4 bits ─► MatMulNBits, accuracy_level 1
                                   └─ 8 bits ─► DequantizeLinear ─ Transpose ─ MatMul
    RowwiseMatMul ─► its exact form, see `graph.rowwise`
    DequantizeLinear ─ MatMul ─► the same, which ONNX Runtime may fuse with accuracy_level 1

ONNX Runtime 1.32 has a float32 kernel for codes of 4 bits on CPUs. For codes of 8 bits it dequantises all matrices at
each step, which takes ten times as long as the products. As a DequantizeLinear they are dequantised once, when the
graph is loaded. The logits of SmolLM2 in int8 are equal bit for bit in both ways.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil

from nbl_export.graph.rowwise import make_exact

__all__ = ["graphs_of", "keep_fp32_activations"]

_FLOAT32 = 1  # onnxruntime, docs/ContribOperators.md, MatMulNBits
_FUSED = {"session.qdq_matmulnbits_accuracy_level": str(_FLOAT32)}  # of a DequantizeLinear and a MatMul
_NOT_FUSED = {"session.disable_quant_qdq": "1"}  # otherwise the pair becomes a MatMulNBits again


def keep_fp32_activations(proto: Any) -> dict[str, str]:
    """Change a graph in place, without its external data; returns entries of the session's configuration."""
    graphs = list(graphs_of(proto.graph))
    stored = {tensor.name for tensor in proto.graph.initializer}
    uses = Counter(name for graph in graphs for node in graph.node for name in node.input)
    products = [node for graph in graphs for node in graph.node if node.op_type == "MatMulNBits"]
    wide = [
        node
        for node in products
        if _numbers(node).get("bits") == 8
        if _numbers(node)["K"] % _numbers(node)["block_size"] == 0  # the last block of a row is not padded
        if len(node.input) <= 4 and all(name in stored and uses[name] == 1 for name in node.input[1:3])
    ]
    rows = make_exact(proto)
    size = sum(4 * _numbers(node)["N"] * _numbers(node)["K"] for node in wide)
    size += sum(4 * math.prod(codes.dims) for codes in rows)
    if size > psutil.virtual_memory().available / 2:
        wide = []
        rows = []  # dequantised at each run
    made = [new for node in wide for new in _dequantised(proto, node)]
    for attribute in (a for node in products for a in node.attribute):
        attribute.i = _FLOAT32 if attribute.name == "accuracy_level" else attribute.i
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*made, *nodes])
    return _FUSED | (_NOT_FUSED if wide or rows else {})


def graphs_of(graph: Any) -> Iterator[Any]:
    """A graph, and the graphs inside its nodes."""
    yield graph
    for attribute in (a for node in graph.node for a in node.attribute if a.HasField("g")):
        yield from graphs_of(attribute.g)


def _numbers(node: Any) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def _dequantised(proto: Any, node: Any) -> list[Any]:
    """Make a MatMul of a MatMulNBits; returns the nodes that make its matrix, outside of all branches."""
    from onnx import helper, numpy_helper

    own = _numbers(node)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    shape = [own["N"], own["K"] // own["block_size"]]
    name = node.name
    x, codes, scales, *rest = node.input
    for tensor, dims in ((codes, [own["N"], own["K"]]), (scales, shape)):
        del tensors[tensor].dims[:]
        tensors[tensor].dims.extend(dims)
    zeros = rest[0] if rest and rest[0] else f"{name}/zeros"
    if zeros not in tensors:
        proto.graph.initializer.append(numpy_helper.from_array(np.full(shape, 128, np.uint8), zeros))
    blocks: dict[str, Any] = {"axis": 1, "block_size": own["block_size"]}
    wide = f"{name}/wide"
    turned = f"{name}/turned"
    made = [
        helper.make_node("DequantizeLinear", [codes, scales, zeros], [wide], f"{name}/DequantizeLinear", **blocks),
        helper.make_node("Transpose", [wide], [turned], f"{name}/Transpose"),
    ]
    node.CopyFrom(helper.make_node("MatMul", [x, turned], list(node.output), f"{name}/MatMul"))
    return made
