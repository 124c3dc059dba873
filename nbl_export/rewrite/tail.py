"""Above the last kept attention layer no token reads another: compute only the last valid token there.

    before   x ------------------- join -- mlp -- ... -- lm_head -> logits [B, T, V]
             attention output ----^
    after    x -- GatherND(last) -- join -- mlp -- ... -- lm_head -> logits [B, 1, V]
             attention output -- GatherND(last) -^

Which position is the last valid one of each row `last_valid` computes, from the mask or, in the static form, from an
input that is added. Legal where only the logits of the last position are wanted. With the original graph the last kept
layer is the last: its MLP, the final norm and the head run on one token. Refuses a tail in which anything but the
join's own two inputs depends on the tokens.
"""

from __future__ import annotations

import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.rewrite.anatomy import cache_layers, find_block, is_constant
from nbl_export.rewrite.last_valid import PREFIX, last_valid

__all__ = ["PruneTail"]


class PruneTail(ir.passes.InPlacePass):
    """Gather the last valid token in front of the last kept layer's residual join."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        logits = next((v for v in graph.outputs if v.name == "logits"), None)
        if logits is None:
            raise RefusalError(None, "it has no output named logits; only its last position could be pruned")
        if logits.shape is not None and len(logits.shape) == 3 and logits.shape[1] == 1:
            return ir.passes.PassResult(model, modified=False)
        block = find_block(graph, cache_layers(graph)[-1])
        tail = _tail_of(graph, block.join)
        _check_tail(block.layer, block.join, tail)
        nodes, index = last_valid(graph)
        for i, name in ((block.branch_index, "attention"), (1 - block.branch_index, "residual")):
            value = block.join.inputs[i]
            assert value is not None
            gather = ir.node("GatherND", [value, index], attributes={"batch_dims": 1}, name=f"{PREFIX}/{name}")
            gather.outputs[0].name = f"{PREFIX}/{name}/output_0"
            gather.outputs[0].type = value.type
            nodes.append(gather)
            block.join.replace_input_with(i, gather.outputs[0])
        graph.insert_before(block.join, nodes)
        for value in (v for node in tail for v in node.outputs):
            value.shape = None
        logits.shape = ir.Shape([_batch(graph), 1, _width(graph, logits)])
        return ir.passes.PassResult(model, modified=True)


def _tail_of(graph: ir.Graph, join: ir.Node) -> list[ir.Node]:
    reached = set(join.outputs)
    tail = [join]
    for node in graph:
        if node is not join and any(v in reached for v in node.inputs):
            reached.update(node.outputs)
            tail.append(node)
    return tail


def _check_tail(layer: int, join: ir.Node, tail: list[ir.Node]) -> None:
    made = {v for node in tail for v in node.outputs}
    for value in made:
        if value.is_graph_output() and value.name != "logits":
            raise RefusalError(layer, f"{value.name} is an output behind the last attention, for all positions")
    for node in tail:
        outside = [v for v in node.inputs if v is not None and v not in made and not is_constant(v)]
        if outside and node is not join:
            raise RefusalError(layer, f"{node.name or node.op_type} behind the last attention reads {outside[0].name}")


def _batch(graph: ir.Graph) -> str:
    shape = next(v for v in graph.inputs if v.name == "input_ids").shape
    return str(shape[0]) if shape is not None else "batch_size"


def _width(graph: ir.Graph, logits: ir.Value) -> int | str:
    producer = logits.producer()
    weight = producer.inputs[1] if producer is not None and producer.op_type == "MatMul" else None
    if weight is not None and weight.shape is not None and isinstance(weight.shape[-1], int):
        return weight.shape[-1]
    if producer is not None and "N" in producer.attributes:  # MatMulNBits
        return producer.attributes["N"].as_int()
    return "vocab_size"
