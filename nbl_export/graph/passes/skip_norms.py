"""Skip norms, which add two values and norm the sum; one whose norm nobody reads becomes an Add."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

__all__ = ["SKIP_NORMS", "SUM", "SkipNormToAdd", "bias_of"]

# Operator -> the norm alone.
SKIP_NORMS = {
    "SkipSimplifiedLayerNormalization": "SimplifiedLayerNormalization",
    "SkipLayerNormalization": "LayerNormalization",
}
SUM = 3  # output of a skip norm: the residual stream


class SkipNormToAdd(ir.passes.InPlacePass):
    """Turn a skip norm whose sum alone is read into an Add, or into two if it has a bias input.

        before   SkipSimplifiedLayerNormalization(skip, x) -> (unread, , , sum)      after   Add(skip, x) -> sum

    No node reads the input norm of a replaced layer. But the fused operator of the norm also computes the residual
    stream, so its addition stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in model.graph if _only_sum_is_read(node)]
        for node in found:
            total = node.outputs[SUM]
            adds = [_add(node, 1, *node.inputs[:2])]
            if (bias := bias_of(node)) is not None:
                adds.append(_add(node, 2, adds[0].outputs[0], bias))
            replace_nodes_and_values(model.graph, node, [node], adds, [total], adds[-1].outputs)
        return ir.passes.PassResult(model, modified=bool(found))


def _add(node: ir.Node, number: int, *terms: ir.Value | None) -> ir.Node:
    output = ir.val(f"{node.outputs[SUM].name}/sum{number}")
    return ir.node("Add", terms, outputs=[output], name=f"{node.name}/Add")


def _only_sum_is_read(node: ir.Node) -> bool:
    if node.op_type not in SKIP_NORMS or len(node.outputs) <= SUM:
        return False
    *others, total = node.outputs[: SUM + 1]
    read = [v for v in others if v.consumers() or v.is_graph_output()]
    return not read and bool(total.consumers()) and not total.is_graph_output()


def bias_of(node: ir.Node) -> ir.Value | None:
    """The bias that a skip norm adds to its sum."""
    if node.op_type not in SKIP_NORMS:
        return None
    index = 3 if node.op_type == "SkipSimplifiedLayerNormalization" else 4
    return node.inputs[index] if len(node.inputs) > index else None
