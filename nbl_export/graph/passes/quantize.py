"""Codes in place of floats: quantises the maps of an int8 or int4 graph like the graph's other matrices.

    before   MatMul(x, W' float32)      after   MatMulNBits(x, packed, scales[, zero points])

Bits, block size and accuracy level come from the graph's own MatMulNBits nodes. ONNX Runtime packs each map in a graph
that holds nothing else, so memory holds one map at a time.

             MatMul(x, W')                  MatMul(x, DequantizeLinear(W4', scale; axis 0, block_size))

A graph with int4 blocks gets blocks of the same size (`graph.quantised`); other graphs do not change.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

from nbl_export.errors import MissingPackageError
from nbl_export.graph.emitter import register
from nbl_export.graph.quantised import quantize_weight

__all__ = ["QuantizeMaps"]

_PREFIX = "/nbl/layers."


@dataclass(frozen=True)
class _Scheme:
    bits: int
    block_size: int
    accuracy_level: int
    symmetric: bool


class QuantizeMaps(ir.passes.InPlacePass):
    """Quantise the MatMul of each bypass if the graph has MatMulNBits, or int4 blocks; else do nothing."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        scheme = _scheme_of(model.graph)
        block = _block_of(model.graph)
        ours = (n for n in graph.all_nodes() if n.op_type == "MatMul" and (n.name or "").startswith(_PREFIX))
        maps = [n for n in ours if n.inputs[1] is not None and n.inputs[1].const_value is not None]
        modified = False
        for node in maps:
            if scheme is not None:
                _quantize(graph, node, scheme)
                modified = True
            elif block is not None:
                modified |= quantize_weight(graph, node, block)
        return ir.passes.PassResult(model, modified=modified)


def _scheme_of(graph: ir.Graph) -> _Scheme | None:
    """The most common scheme of the decoder's matrices (an lm_head may have another scheme)."""
    seen = Counter(
        _Scheme(
            node.attributes["bits"].as_int(),
            node.attributes["block_size"].as_int(),
            node.attributes.get_int("accuracy_level", 0),
            len(node.inputs) < 4 or node.inputs[3] is None,
        )
        for node in graph
        if node.op_type == "MatMulNBits"
    )
    return seen.most_common(1)[0][0] if seen else None


def _quantize(graph: ir.Graph, node: ir.Node, scheme: _Scheme) -> None:
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    packed, constants = _pack(weight.const_value, scheme)
    inputs = [node.inputs[0], *(register(graph, constant) for constant in constants)]
    replacement = ir.node(
        "MatMulNBits",
        inputs,
        attributes=packed.attributes.copy(),
        domain="com.microsoft",
        name=f"{node.name}_Q{scheme.bits}",
    )
    home = node.graph  # the node may be in a branch
    assert home is not None
    replace_nodes_and_values(home, node, [node], [replacement], node.outputs, replacement.outputs)
    del graph.initializers[str(weight.name)]


def _pack(weight: ir.TensorProtocol, scheme: _Scheme) -> tuple[ir.Node, list[ir.TensorProtocol]]:
    """Run ONNX Runtime's quantiser on a graph of this one matrix; returns its node and constants."""
    try:
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits
    except ImportError as error:
        raise MissingPackageError("onnxruntime", "cpu", "quantising the maps") from error

    constant = ir.val(weight.name, const_value=weight)
    x = ir.val("x", weight.dtype, ["N", weight.shape.numpy()[0]])
    y = ir.val("y", weight.dtype)
    product = ir.node("MatMul", [x, constant], outputs=[y], name="map")
    graph = ir.Graph([x], [y], nodes=[product], initializers=[constant], opset_imports={"": 21})
    config = nbits.DefaultWeightOnlyQuantConfig(
        block_size=scheme.block_size,
        is_symmetric=scheme.symmetric,
        accuracy_level=scheme.accuracy_level,
        bits=scheme.bits,
    )
    logging.disable(logging.INFO)  # the quantiser logs each node
    try:
        quantizer = nbits.MatMulNBitsQuantizer(ir.to_proto(ir.Model(graph, ir_version=10)), algo_config=config)
        quantizer.process()
    finally:
        logging.disable(logging.NOTSET)
    result = ir.from_proto(quantizer.model.model).graph
    (node,) = [n for n in result if n.op_type == "MatMulNBits"]
    return node, [v.const_value for v in node.inputs[1:] if v is not None and v.const_value is not None]


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
