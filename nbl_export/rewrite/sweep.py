"""Removes what a bypass leaves behind: unread nodes and initializers, and norms whose normalised output is unread.

    before   SkipSimplifiedLayerNormalization(skip, x) -> (unread, , , sum)      after   Add(skip, x) -> sum

No node reads the input norm of a replaced layer. But the fused operator of the norm also computes the residual stream,
so its addition stays.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

__all__ = ["SkipNormToAdd", "Sweep"]

Sweep = RemoveUnusedNodesPass


class SkipNormToAdd(ir.passes.InPlacePass):
    """Turn a skip norm whose sum alone is read into an Add, or into two if it has a bias input."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in model.graph if _only_sum_is_read(node)]
        for node in found:
            left, right, bias = node.inputs[0], node.inputs[1], _bias(node)
            total = node.outputs[3]
            terms = [(left, right)] if bias is None else [(left, right), (None, bias)]
            adds: list[ir.Node] = []
            for a, b in terms:
                adds.append(ir.node("Add", [a if a is not None else adds[-1].outputs[0], b], name=f"{node.name}/Add"))
                adds[-1].outputs[0].name = f"{total.name}/sum{len(adds)}"
            last = adds[-1].outputs[0]
            last.type, last.shape = total.type, total.shape
            model.graph.insert_before(node, adds)
            total.replace_all_uses_with(last)
            model.graph.remove(node, safe=True)
            last.name = total.name
        return ir.passes.PassResult(model, modified=bool(found))


def _only_sum_is_read(node: ir.Node) -> bool:
    if node.op_type not in ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization") or len(node.outputs) < 4:
        return False
    *others, total = node.outputs[:4]
    read = [v for v in others if v.consumers() or v.is_graph_output()]
    return not read and bool(total.consumers()) and not total.is_graph_output()


def _bias(node: ir.Node) -> ir.Value | None:
    index = 3 if node.op_type == "SkipSimplifiedLayerNormalization" else 4
    return node.inputs[index] if len(node.inputs) > index else None
