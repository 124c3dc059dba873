"""Above the last kept attention layer no token reads another, so only the last valid token is computed there.

    before   x ------------------------------ join -- mlp -- ... -- lm_head -> logits [B, T, V]
             attention -- o_proj -------------^
    after    x -- GatherND(last) ------------ join -- mlp -- ... -- lm_head -> logits [B, 1, V]
             attention -- GatherND(last) -- o_proj -^

`last_valid` computes the index of each row's last valid token, from the mask or, in the static form, from an added
input. The result is correct if only the logits of the last position are used. In the original graph the last kept layer
is the last layer: its MLP, the final norm and the head run on one token. With more than one row, `last_rows` takes the
last positions of the chunk instead, for speculative decoding.

Refuses a tail in which anything but the two inputs of the join depends on the tokens. On the path from the attention to
the join, the gather moves back past each node that computes every token by itself. So it stands in front of o_proj,
unless a dynamic quantisation before o_proj shares one scale among all tokens.
"""

from __future__ import annotations

import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import cache_layers, find_block, is_constant
from nbl_export.rewrite.tail.last_rows import LastRows
from nbl_export.rewrite.tail.last_valid import LastValid

__all__ = ["PruneTail"]


class PruneTail(ir.passes.InPlacePass):
    """Gather the last valid token in front of the last kept layer's o_proj and residual join.

    Args:
        rows: positions to compute. More than one keeps the shape of the logits, with zeros in front.
    """

    def __init__(self, rows: int = 1) -> None:
        super().__init__()
        self.rows = rows

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
        last = LastValid(graph) if self.rows == 1 else LastRows(graph, self.rows)
        way = _way_of_single_tokens(block.join, block.branch_index)
        user, i = way[0]
        attention = user.inputs[i]
        assert attention is not None
        producer = attention.producer()  # insert behind it: a product's dequantised weight stays beside the product
        assert producer is not None
        graph.insert_after(producer, [*last.index, _take_last(last, user, i, "attention")])
        graph.insert_before(block.join, _take_last(last, block.join, 1 - block.branch_index, "residual"))
        shape = [_batch(graph), 1 if self.rows == 1 else _tokens(graph), _width(graph, logits)]
        for value in (v for node in (*tail, *(node for node, _ in way)) for v in node.outputs):
            value.shape = None
        logits.shape = ir.Shape(shape)
        last.finish(logits)
        return ir.passes.PassResult(model, modified=True)


def _take_last(last: LastValid | LastRows, user: ir.Node, i: int, name: str) -> ir.Node:
    """Make the node that `user` now reads at its input i; the node is not in the graph yet."""
    value = user.inputs[i]
    assert value is not None
    node = last.take(value, name)
    user.replace_input_with(i, node.outputs[0])
    return node


def _way_of_single_tokens(join: ir.Node, index: int) -> list[tuple[ir.Node, int]]:
    """Path of (node, input index) to the join; the last token can be taken in front of its first node."""
    way = [(join, index)]
    while True:
        user, i = way[0]
        value = user.inputs[i]
        node = None if value is None else value.producer()
        if value is None or node is None or len(value.uses()) != 1 or value.is_graph_output():
            return way
        entering = [k for k, v in enumerate(node.inputs) if v is not None and not is_constant(v)]
        if len(node.outputs) != 1 or len(entering) != 1 or not _is_for_each_token(node, entering[0]):
            return way
        way.insert(0, (node, entering[0]))


def _is_for_each_token(node: ir.Node, entering: int) -> bool:
    """Whether a node computes each token [B, T, ...] of input `entering` from that token alone."""
    others = [v for i, v in enumerate(node.inputs) if v is not None and i != entering]
    if node.op_type in ("MatMul", "MatMulNBits"):
        return entering == 0
    if node.op_type in ("Add", "Mul"):
        return all(v.shape is not None and all(n == 1 for n in v.shape[:-1]) for v in others)
    if node.op_type in ("SimplifiedLayerNormalization", "RMSNormalization"):
        return entering == 0 and ("axis" not in node.attributes or node.attributes["axis"].as_int() in (-1, 2))
    return node.op_type == "Cast"


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


def _tokens(graph: ir.Graph) -> str:
    shape = next(v for v in graph.inputs if v.name == "input_ids").shape
    return str(shape[1]) if shape is not None else "sequence_length"


def _width(graph: ir.Graph, logits: ir.Value) -> int | str:
    producer = logits.producer()
    weight = producer.inputs[1] if producer is not None and producer.op_type == "MatMul" else None
    if weight is not None and weight.shape is not None and isinstance(weight.shape[-1], int):
        return weight.shape[-1]
    if producer is not None and "N" in producer.attributes:  # MatMulNBits
        return producer.attributes["N"].as_int()
    return "vocab_size"
