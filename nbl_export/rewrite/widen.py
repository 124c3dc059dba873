"""The float32 twin of a quantised graph: a float32 copy of the same graph, with all codes unpacked.

    before   MatMulNBits(x, codes, scales[, zeros][, bias])         after   MatMul(x, W') [-- Add(bias)]
             GatherBlockQuantized(codes, ids, scales[, zeros])              Gather(W, ids)
             DequantizeLinear(codes, scales[, zeros])                       W
             DynamicQuantizeLinear(x) -- MatMulInteger(., codes)            MatMul(x, W'), and the scale of x is 1
             QMoE(x, scores, codes, scales, ...)                            MoE(x, scores, W, ...)

All else is equal, value for value and name for name. A wrong connection of the quantised graph is therefore in the
float32 copy too, where no quantisation noise hides it. Refuses what `graph.quantised` refuses.

A lean twin keeps lookups, and the codes of MatMulNBits, whose kernel then multiplies in float32 (accuracy_level 1). It
is as large as the graph, for models whose float32 matrices do not fit into memory. Its steps are slower.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.emitter import register
from nbl_export.graph.files import read_graph
from nbl_export.graph.quantised import HOLDERS, expert_matrices, quantised_matrices
from nbl_export.records.quantised import StoredMatrix
from nbl_export.rewrite.blocks import Sweep

__all__ = ["Widen", "save_twin"]

_LEAN = ("MatMulNBits", "GatherBlockQuantized")  # these compute in float32 from codes
_FLOAT32 = 1  # onnxruntime, docs/ContribOperators.md, MatMulNBits, accuracy_level


def save_twin(graph: Path, out: Path, *, lean: bool = False) -> None:
    """Write the float32 twin of a graph into a directory, under the same name, with its weights beside it.

    Raises:
        RefusalError: an operator has no known float32 form.
    """
    model = read_graph(graph)
    Widen(lean=lean)(model)
    out.mkdir(parents=True, exist_ok=True)
    ir.save(model, out / graph.name, external_data=f"{graph.name}.data")


class Widen(ir.passes.InPlacePass):
    """Turn every quantised product and lookup into its float32 form; a graph without any does not change."""

    def __init__(self, *, lean: bool = False) -> None:
        super().__init__()
        self._lean = lean

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        matrices = quantised_matrices(graph)
        rest = [node for node in graph if node.op_type in HOLDERS and node not in matrices]
        for node, matrix in matrices.items():
            if not self._lean or node.op_type not in _LEAN:
                _widen(graph, node, matrix)
            elif node.op_type == "MatMulNBits":
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _FLOAT32)
        for node in rest:
            _fold(graph, node)
        for node in [n for n in graph if n.op_type == "DynamicQuantizeLinear"]:
            node.outputs[1].replace_all_uses_with(_constant(graph, f"{node.name}/one", np.float32(1)))
        experts = expert_matrices(graph)
        for node, pair in experts.items():
            _widen_experts(graph, node, pair)
        changed = bool(matrices or rest or experts)
        if changed:
            Sweep()(model)
        return ir.passes.PassResult(model, modified=changed)


def _widen(graph: ir.Graph, node: ir.Node, matrix: StoredMatrix) -> None:
    weight = _unpacked(graph, f"{node.name}/wide", matrix)
    if node.op_type == "DequantizeLinear":
        node.outputs[0].replace_all_uses_with(weight)
        graph.remove(node, safe=True)
    elif node.op_type == "GatherBlockQuantized":
        _put(graph, node, [ir.node("Gather", [weight, node.inputs[1]], {"axis": 0}, name=node.name)])
    else:
        nodes = [ir.node("MatMul", [_activation(node), weight], name=node.name)]
        bias = node.inputs[5] if node.op_type == "MatMulNBits" and len(node.inputs) > 5 else None
        if bias is not None:
            nodes[0].outputs[0].name = f"{node.name}/product"
            nodes.append(ir.node("Add", [nodes[0].outputs[0], bias], name=f"{node.name}/Add"))
        _put(graph, node, nodes)


def _widen_experts(graph: ir.Graph, node: ir.Node, pair: tuple[StoredMatrix, ...]) -> None:
    first, second = (_stacked(graph, matrix, node.inputs[place]) for matrix, place in zip(pair, (2, 5), strict=True))
    inputs = [*node.inputs[:2], first, node.inputs[4], second, node.inputs[7]]
    kept = [a for name, a in node.attributes.items() if name not in _OF_CODES]
    _put(graph, node, [ir.Node("com.microsoft", "MoE", inputs, kept, name=node.name)])


_OF_CODES = ("expert_weight_bits", "block_size", "quant_type")


def _stacked(graph: ir.Graph, matrix: StoredMatrix, codes: ir.Value | None) -> ir.Value:
    """A constant [experts, N, K], whose values are computed when it is written."""
    assert codes is not None and codes.const_value is not None
    experts, (rows, columns), name = int(codes.const_value.shape.numpy()[0]), matrix.shape, f"{matrix.name}/wide"
    dims = (experts, rows // experts, columns)
    lazy = ir.LazyTensor(
        lambda: ir.tensor(_operand(matrix).reshape(dims), name=name), ir.DataType.FLOAT, ir.Shape(dims), name=name
    )
    return register(graph, lazy)


def _activation(node: ir.Node) -> ir.Value | None:
    """The input of a product before its quantisation."""
    given = node.inputs[0]
    if node.op_type != "MatMulInteger":
        return given
    maker = None if given is None else given.producer()
    if maker is None or maker.op_type != "DynamicQuantizeLinear":
        raise RefusalError(None, f"the input of {node.name} does not come directly from DynamicQuantizeLinear")
    return maker.inputs[0]


def _unpacked(graph: ir.Graph, name: str, matrix: StoredMatrix) -> ir.Value:
    """A constant whose values are computed when it is written, so memory holds one matrix at a time."""
    shape = ir.Shape(reversed(matrix.shape) if matrix.transposed else matrix.shape)
    tensor = ir.LazyTensor(lambda: ir.tensor(_operand(matrix), name=name), ir.DataType.FLOAT, shape, name=name)
    return register(graph, tensor)


def _operand(matrix: StoredMatrix) -> np.ndarray:
    """The matrix that a float32 graph has in this place."""
    values = matrix.blocks().values
    return np.ascontiguousarray(values.T) if matrix.transposed else values


def _fold(graph: ir.Graph, node: ir.Node) -> None:
    """Compute a DequantizeLinear of a tensor that is no matrix: a vector, or values that share one scale."""
    codes, scales, *rest = (None if v is None else v.const_value for v in node.inputs)
    if codes is None or scales is None or scales.size != 1:
        raise RefusalError(None, f"{node.name} dequantises something else than a matrix that is stored")
    zero = rest[0].numpy().astype(np.float32) if rest and rest[0] is not None else np.float32(0)
    array = (codes.numpy().astype(np.float32) - zero) * scales.numpy().astype(np.float32)
    node.outputs[0].replace_all_uses_with(_constant(graph, f"{node.name}/wide", array.reshape(codes.shape.numpy())))
    graph.remove(node, safe=True)


def _put(graph: ir.Graph, node: ir.Node, made: list[ir.Node]) -> None:
    """Put nodes in place of one; the last one's output takes over the name."""
    old, new = node.outputs[0], made[-1].outputs[0]
    new.type, new.shape, name = ir.TensorType(ir.DataType.FLOAT), old.shape, old.name
    graph.insert_before(node, made)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    new.name = name


def _constant(graph: ir.Graph, name: str, array: np.ndarray | np.float32) -> ir.Value:
    return register(graph, ir.tensor(np.asarray(array), name=name))
