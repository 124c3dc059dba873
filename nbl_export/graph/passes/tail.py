"""Above the last kept attention, only the last valid token is computed.

    before   x ------------------------------ join -- mlp -- ... -- lm_head -> logits [B, T, V]
             attention -- o_proj -------------^
    after    x -- GatherND(last) ------------ join -- mlp -- ... -- lm_head -> logits [B, 1, V]
             attention -- GatherND(last) -- o_proj -^

`LastValid` computes the index of each row's last valid token, from the mask or, in the static form, from an added
input. The result is correct if only the logits of the last position are used. In the original graph the last kept layer
is the last layer: its MLP, the final norm and the head run on one token.

Refuses a tail in which anything but the two inputs of the join depends on the tokens. On the path from the attention to
the join, the gather moves back past each node that computes every token by itself. So it stands in front of o_proj,
unless a dynamic quantisation before o_proj shares one scale among all tokens.

A directory then has two graphs on the same data, because external data cannot lie outside a graph's directory:

    model.onnx       the deployed graph: one token behind the last kept attention
    all_logits.onnx  the graph before pruning; for perplexity, verification and log-probabilities of a prompt
    model.onnx.data  weights of both
    (decoder.onnx and its data in a directory of the static form, which its compiler reads)

Runtimes do not open the second graph: GenAI opens the file that genai_config.json names, others open model.onnx. A
rewrite starts from the second graph, because the result has another last kept layer and so a longer tail.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import cache_layers, find_block, is_constant
from nbl_export.graph.caches import is_static
from nbl_export.graph.emitter import Maker, dependent_nodes, need, values_read
from nbl_export.graph.files import read_graph
from nbl_export.graph.names import ALL_LOGITS_FILE, EXIT_ROWS, graph_file

__all__ = ["LastValid", "PruneTail", "difference", "keep_last_token"]

_PREFIX = "/nbl/tail"  # begins the names of all nodes that tail pruning adds
_UNKNOWN = ("batch_size", "sequence_length", "vocab_size")  # dimensions of logits whose shape is not stated
_LEAST_OPSET = 18  # the first in which ReduceMax takes its axes as an input


class PruneTail(ir.passes.InPlacePass):
    """Gather the last valid token in front of that layer's o_proj and residual join."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        logits = next((v for v in graph.outputs if v.name == "logits"), None)
        if logits is None:
            raise RefusalError(None, "it has no output named logits; only its last position could be pruned")
        dims = logits.shape if logits.shape is not None and len(logits.shape) == 3 else _UNKNOWN
        if dims[1] == 1:
            return ir.passes.PassResult(model, modified=False)
        block = find_block(graph, cache_layers(graph)[-1])
        tail = [block.join, *dependent_nodes(graph, block.join.outputs)]
        _check_tail(block.layer, block.join, tail)
        index, at = _last_row(graph)
        way = _way_of_single_tokens(block.join, block.branch_index)
        user, i = way[0]
        producer = need(user.inputs[i], f"input {i} of {user.name}").producer()
        assert producer is not None
        take = Maker(graph, f"{_PREFIX}/")
        for name, node, k in (("attention", user, i), ("residual", block.join, 1 - block.branch_index)):
            value = need(node.inputs[k], f"input {k} of {node.name}")
            node.replace_input_with(k, take("GatherND", name, value, at, dtype=value.dtype, batch_dims=1))
        producer.append([*index, take.nodes[0]])  # a product's dequantised weight stays beside the product
        block.join.prepend(take.nodes[1])
        for value in (v for node in (*tail, *(node for node, _ in way)) for v in node.outputs):
            value.shape = None
        logits.shape = ir.Shape([dims[0], 1, dims[2]])
        return ir.passes.PassResult(model, modified=True)


def _last_row(graph: ir.Graph) -> tuple[list[ir.Node], ir.Value]:
    """New nodes, and the index of the last row that they compute; an exit layer (`methods.predicted_kv.passes`) has
    computed its own index."""
    for node in graph:
        if node.name == EXIT_ROWS:
            return [], node.outputs[0]
    last = LastValid(graph)
    return last.index, last.at


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
    if node.op_type in ("MatMul", "MatMulNBits", "RowwiseMatMul"):
        return entering == 0
    if node.op_type in ("Add", "Mul"):
        return all(v.shape is not None and all(n == 1 for n in v.shape[:-1]) for v in others)
    if node.op_type in ("SimplifiedLayerNormalization", "RMSNormalization"):
        return entering == 0 and node.attributes.get_int("axis", -1) in (-1, 2)
    return node.op_type == "Cast"


def _check_tail(layer: int, join: ir.Node, tail: list[ir.Node]) -> None:
    """Refuse a tail in which anything but its first join depends on the tokens."""
    made = {v for node in tail for v in node.outputs}
    for value in made:
        if value.is_graph_output() and value.name != "logits":
            raise RefusalError(layer, f"{value.name} is an output behind the last attention, for all positions")
    for node in tail:
        outside = [v for v in values_read(node) if v not in made and not is_constant(v)]
        if outside and node is not join:
            raise RefusalError(layer, f"{node.name or node.op_type} behind the last attention reads {outside[0].name}")


class LastValid:
    """The index of each row's last valid token of values [B, T, ...] of a graph.

        attention_mask [B, past + T]   max(mask[:, -T:] x 0..T-1)     rows padded on either side, decode steps
        num_tokens [B]                 max(num_tokens - 1, 0)         the static form, which has no mask

    In the static form the input num_tokens (valid new tokens of each row) is added behind write_indices. A row that
    is idle in a step has num_tokens 0. It gets the index of its first padding token, whose logits must be ignored.
    ArgMax could also find the last 1 of a mask. But TensorRT's parser refuses to take the last of equal values, and
    CUDA has no kernel for it.

    Args:
        prefix, constants: begin the names of nodes and of constants.

    Attributes:
        index: nodes that compute the index; they are not in the graph yet.
        at: the index [B, 1, 1].
        chunk: the mask of this chunk [B, T]; None in the static form.

    Raises:
        RefusalError: no input says which tokens are valid; the graph has not changed.
    """

    def __init__(self, graph: ir.Graph, prefix: str = _PREFIX, constants: str = "nbl.tail") -> None:
        make = Maker(graph, f"{prefix}/", ir.DataType.INT64, f"{constants}.")
        self.index = make.nodes
        self.chunk: ir.Value | None = None
        inputs = {str(v.name): v for v in graph.inputs}
        if is_static(graph):
            self.at = _from_counts(make, inputs["input_ids"], inputs["write_indices"])
            return
        if "input_ids" not in inputs or "attention_mask" not in inputs:
            raise RefusalError(None, "it has no input_ids and attention_mask, from which the last valid token is known")
        mask = inputs["attention_mask"]
        if graph.opset_imports.get("", 0) < _LEAST_OPSET:
            raise RefusalError(
                None, f"its operators are of opset {graph.opset_imports.get('')}, not {_LEAST_OPSET} or later"
            )
        if mask.dtype != ir.DataType.INT64:
            raise RefusalError(None, f"its attention_mask is {mask.dtype}, not int64")
        self.chunk, self.at = _from_mask(make, inputs["input_ids"], mask)


def _from_counts(make: Maker, ids: ir.Value, writes: ir.Value) -> ir.Value:
    """The index, by the input num_tokens, which is added."""
    counts = ir.val("num_tokens", ir.DataType.INT64, None if ids.shape is None else ir.Shape(ids.shape[:1]))
    make.graph.inputs.insert(list(make.graph.inputs).index(writes) + 1, counts)
    last = make("Sub", "last", counts, make.constant("one", 1))
    found = make("Max", "found", last, make.constant("zero", 0))
    return make("Unsqueeze", "index", found, make.constant("axes", [1, 2]))


def _from_mask(make: Maker, ids: ir.Value, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The mask of this chunk, and the index."""
    end, start, step, axis, last = (
        make.constant(name, values)
        for name, values in (
            ("end", [np.iinfo(np.int64).max]),
            ("first", 0),
            ("step", 1),
            ("axis", [1]),
            ("last", [-1]),
        )
    )
    length = make("Shape", "length", ids, start=1, end=2)
    chunk = make("Slice", "mask", mask, make("Neg", "start", length), end, axis)
    positions = make("Range", "positions", start, make("Squeeze", "tokens", length), step)
    found = make("ReduceMax", "found", make("Mul", "valid", chunk, positions), axis, keepdims=1)
    return chunk, make("Unsqueeze", "index", found, last)


def keep_last_token(directory: Path) -> None:
    """Rename the graph to all_logits.onnx, byte for byte, and write the pruned graph in its place.

    Raises:
        RefusalError: the tail of this graph cannot be pruned; no file has changed.
    """
    path = directory / graph_file(directory)
    model = _pruned(path)
    os.replace(path, directory / ALL_LOGITS_FILE)
    ir.save(model, path)


def difference(directory: Path) -> str:
    """How the deployed graph differs from the pruned all_logits.onnx; "" if all nodes and weights are equal."""
    if not (directory / ALL_LOGITS_FILE).is_file():
        return f"there is no {ALL_LOGITS_FILE}"
    expected = ir.to_proto(_pruned(directory / ALL_LOGITS_FILE))
    found = ir.to_proto(read_graph(directory / graph_file(directory)))
    for kind in ("input", "output", "initializer", "node"):
        ours = getattr(found.graph, kind)
        theirs = getattr(expected.graph, kind)
        if len(ours) != len(theirs):
            return f"{len(ours)} {kind}s, not {len(theirs)}"
        for one, other in zip(ours, theirs, strict=True):
            if one.SerializeToString(deterministic=True) != other.SerializeToString(deterministic=True):
                return f"{kind} {one.name} differs"
    return ""


def _pruned(path: Path) -> ir.Model:
    model = read_graph(path)
    try:
        PruneTail()(model)
    except RefusalError as error:
        raise RefusalError(
            error.layer,
            f"{error.reason} (nodes behind the last attention cannot be pruned; use the key logits = 'all')",
        ) from error
    return model
