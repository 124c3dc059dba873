"""The head runs on one token of each row, the last that is not padding.

    before   residual [B, T, D] -------------------------------------- norm -- lm_head -- logits [B, T, V]
    after    residual [B, T, D] -- GatherND(num_tokens - 1) [B, 1, D] -- norm -- lm_head -- logits [B, 1, V]

Adds the input num_tokens [B], the valid new tokens of each row. A row that sits a step out says 0; it gets the
logits of its first pad, to be ignored.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nbl_export.decoders.static_form.graph import Emitter, graph_input, is_weight, need, shape_of
from nbl_export.errors import RefusalError

__all__ = ["LastTokenLogits"]

_NORMS = ("RMSNormalization", "LayerNormalization")
_HEAD_NODES = 12  # head, soft cap, scale, casts: no head is longer
_I64 = ir.DataType.INT64


class LastTokenLogits(ir.passes.InPlacePass):
    """Cut the residual stream to one token a row in front of the final norm. Does nothing to a graph that has it."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, emit = model.graph, Emitter(model.graph)
        if any(v.name == "num_tokens" for v in graph.inputs):
            return ir.passes.PassResult(model, False)
        ids, logits = graph_input(graph, "input_ids"), graph.outputs[0]
        batch = shape_of(ids)[0]
        norm = _final_norm(logits)
        stream = need(norm.inputs[0], "the residual stream")
        counts = ir.Value(name="num_tokens", type=ir.TensorType(_I64), shape=ir.Shape([batch]))
        graph.inputs.insert(2, counts)
        index = _last_index(emit, counts, batch)
        dims = [batch, 1, stream.shape[2] if stream.shape is not None else None]
        cut = emit("GatherND", stream, index, name="last_token/hidden", dtype=stream.dtype, shape=dims, batch_dims=1)
        norm.replace_input_with(0, cut)
        _one_token(logits, cut)
        return ir.passes.PassResult(model, True)


def _last_index(emit: Emitter, counts: ir.Value, batch: int | ir.SymbolicDim) -> ir.Value:
    one, zero = (emit.constant(name, np.array(n, np.int64)) for name, n in (("one", 1), ("zero", 0)))
    last = emit("Sub", counts, one, name="last_token/index", dtype=_I64, shape=[batch])
    safe = emit("Max", last, zero, name="last_token/safe", dtype=_I64, shape=[batch])
    axes = emit.constant("axes_1_2", np.array([1, 2], np.int64))
    return emit("Unsqueeze", safe, axes, name="last_token/rows", dtype=_I64, shape=[batch, 1, 1])


def _final_norm(logits: ir.Value) -> ir.Node:
    """Walk up from the logits to the norm they start from."""
    value = logits
    for _ in range(_HEAD_NODES):
        node = value.producer()
        data = [v for v in node.inputs if v is not None and not is_weight(v)] if node is not None else []
        if node is None or len(data) != 1:
            break
        if node.op_type in _NORMS:
            return node
        value = data[0]
    raise RefusalError(None, "there is no single final norm above its logits")


def _one_token(value: ir.Value, cut: ir.Value) -> None:
    """State T = 1 in the shapes between the cut and the logits."""
    while value is not cut:
        if value.shape is not None:
            value.shape = ir.Shape([value.shape[0], 1, *value.shape[2:]])
        producer = value.producer()
        value = next(v for v in (producer.inputs if producer else ()) if v is not None and not is_weight(v))
