"""Computes positions from the slots that tokens are written to.

    before   inputs input_ids [B, T], position_ids [B, T], write_indices [B]
    after    inputs input_ids [B, T], write_indices [B];  positions[b, t] = min(write_indices[b] + t, S - 1)

The slot of a token is its position, so there is one source of truth. The clamp changes only padding behind the last
slot, whose rows nobody reads. Without the clamp the rotary lookup of this padding would be out of bounds: ONNX Runtime
stops, and a GPU reads whatever lies there.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nbl_export.graph.emitter import Emitter, cache_slots, drop_input, graph_input, shape_of

__all__ = ["POSITIONS", "DerivedPositions"]

POSITIONS = "positions"
_I64 = ir.DataType.INT64


class DerivedPositions(ir.passes.InPlacePass):
    """Replace the input position_ids by computed positions; run after `HeadMajorCaches`."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, emit = model.graph, Emitter(model.graph)
        given = graph_input(graph, "position_ids")
        ids, write = graph_input(graph, "input_ids"), graph_input(graph, "write_indices")
        batch, tokens = shape_of(ids)
        steps = _count_up(emit, ids, tokens)
        axis = emit.constant("axis_1", np.array([1], np.int64))
        base = emit("Unsqueeze", write, axis, name="positions/base", dtype=_I64, shape=[batch, 1])
        free = emit("Add", base, steps, name="positions/free", dtype=_I64, shape=[batch, tokens])
        last = emit.constant("last_slot", np.array(cache_slots(graph) - 1, np.int64))
        positions = emit("Min", free, last, name=POSITIONS, dtype=_I64, shape=[batch, tokens])
        given.replace_all_uses_with(positions)
        drop_input(graph, given)
        return ir.passes.PassResult(model, True)


def _count_up(emit: Emitter, ids: ir.Value, tokens: int | ir.SymbolicDim) -> ir.Value:
    """0, 1, ... T - 1."""
    count = emit("Shape", ids, name="positions/count", dtype=_I64, shape=[1], start=1, end=2)
    axis = emit.constant("axis_0", np.array([0], np.int64))
    stop = emit("Squeeze", count, axis, name="positions/stop", dtype=_I64, shape=[])
    zero, one = (emit.constant(name, np.array(n, np.int64)) for n, name in enumerate(("zero", "one")))
    return emit("Range", zero, stop, one, name="positions/steps", dtype=_I64, shape=[tokens])
