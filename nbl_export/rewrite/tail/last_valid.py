"""Computes the index of each row's last valid token in a chunk, inside the graph.

    attention_mask [B, past + T]   max(mask[:, -T:] x 0..T-1)     rows padded on either side, decode steps
    num_tokens [B]                 max(num_tokens - 1, 0)         the static form, which has no mask

In the static form the input num_tokens (valid new tokens of each row) is added behind write_indices.
A row that rests in a step has num_tokens 0. It gets the index of its first padding token, whose logits must be ignored.
ArgMax could also find the last 1 of a mask. But TensorRT's parser refuses to take the last of equal values, and CUDA
has no kernel for it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.rewrite.tail.emitter import Emitter

__all__ = ["LastValid"]

_PREFIX = "/nbl/tail"  # begins the names of all nodes that tail pruning adds
_LEAST_OPSET = 18  # the first in which ReduceMax takes its axes as an input
_WRITES = "write_indices"


class LastValid:
    """Takes each row's last valid token of values [B, T, ...] of a graph; for `tail.PruneTail`.

    Raises:
        RefusalError: no input says which tokens are valid; the graph has not changed.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.index, self._at = _index(graph)

    def take(self, value: ir.Value, name: str) -> ir.Node:
        """A node that takes the last valid token; it is not in the graph yet."""
        node = ir.node("GatherND", [value, self._at], attributes={"batch_dims": 1}, name=f"{_PREFIX}/{name}")
        node.outputs[0].name = f"{_PREFIX}/{name}/output_0"
        node.outputs[0].type = value.type
        return node

    def finish(self, logits: ir.Value) -> None:
        """Nothing: the graph gives the logits of one token."""


def _index(graph: ir.Graph) -> tuple[list[ir.Node], ir.Value]:
    """Nodes that compute the index, and its value [B, 1, 1]; the nodes are not in the graph yet."""
    inputs = {str(v.name): v for v in graph.inputs}
    emit = Emitter(graph, _PREFIX, "nbl.tail")
    if "input_ids" in inputs and _WRITES in inputs:
        return emit.nodes, _from_counts(emit, _add_counts(graph, inputs["input_ids"], inputs[_WRITES]))
    if "input_ids" not in inputs or "attention_mask" not in inputs:
        raise RefusalError(None, "it has no input_ids and attention_mask, from which the last valid token is known")
    mask = inputs["attention_mask"]
    if graph.opset_imports.get("", 0) < _LEAST_OPSET:
        raise RefusalError(
            None, f"its operators are of opset {graph.opset_imports.get('')}, not {_LEAST_OPSET} or later"
        )
    if mask.dtype != ir.DataType.INT64:
        raise RefusalError(None, f"its attention_mask is {mask.dtype}, not int64")
    return emit.nodes, _from_mask(emit, inputs["input_ids"], mask)


def _add_counts(graph: ir.Graph, ids: ir.Value, writes: ir.Value) -> ir.Value:
    counts = ir.Value(name="num_tokens", type=ir.TensorType(ir.DataType.INT64))
    counts.shape = None if ids.shape is None else ir.Shape(ids.shape[:1])
    graph.inputs.insert(list(graph.inputs).index(writes) + 1, counts)
    return counts


def _from_counts(emit: Emitter, counts: ir.Value) -> ir.Value:
    last = emit("Sub", "last", counts, emit.constant("one", 1))
    found = emit("Max", "found", last, emit.constant("zero", 0))
    return emit("Unsqueeze", "index", found, emit.constant("axes", [1, 2]))


def _from_mask(emit: Emitter, ids: ir.Value, mask: ir.Value) -> ir.Value:
    end, start, step, axis, last = (
        emit.constant(name, values)
        for name, values in (
            ("end", [np.iinfo(np.int64).max]), ("first", 0), ("step", 1), ("axis", [1]), ("last", [-1]),
        )
    )  # fmt: skip
    length = emit("Shape", "length", ids, start=1, end=2)
    chunk = emit("Slice", "mask", mask, emit("Neg", "start", length), end, axis)
    positions = emit("Range", "positions", start, emit("Squeeze", "tokens", length), step)
    found = emit("ReduceMax", "found", emit("Mul", "valid", chunk, positions), axis, keepdims=1)
    return emit("Unsqueeze", "index", found, last)
