"""Builds one boolean mask for each distinct window; layers with the same window share it.

    before   Attention(q, K, V, -, ..., nonpad_kv_seqlen; is_causal=1)
    after    Attention(q, K, V, mask [B, 1, T, S]);  mask = slot <= position  [and slot > position - window]

TensorRT silently ignores nonpad_kv_seqlen; only its builder mentions an "Unused Input". TensorRT counts is_causal from
the upper left corner, where a decode token would see slot 0 alone. So this pass removes both. The mask alone is correct
for chunks, for padding and for rows of different lengths: everything behind a row's own position is masked. Masked
values must be finite (0 x NaN is NaN), so caches start zeroed.

mobius' static-cache graph drops a sliding window; this pass restores it from the checkpoint's configuration. The
window counts the token itself, as in transformers: `masking_utils.sliding_window_overlay` keeps kv > q - window.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.emitter import Emitter, cache_slots, drop_input, graph_input, need, shape_of
from nbl_export.targets.tensorrt.static_form.positions import POSITIONS

__all__ = ["ExplicitMasks"]

_BOOL, _I64 = ir.DataType.BOOL, ir.DataType.INT64


class ExplicitMasks(ir.passes.InPlacePass):
    """Give every Attention its mask; run after `DerivedPositions`.

    Args:
        windows: window of each layer in tokens; None if the layer sees all tokens.
    """

    def __init__(self, windows: Sequence[int | None]) -> None:
        super().__init__()
        self._windows = tuple(windows)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, emit = model.graph, Emitter(model.graph)
        positions = next((o for n in graph for o in n.outputs if o.name == POSITIONS), None)
        if positions is None:
            raise RefusalError(None, "it has no positions, which the masks need; run DerivedPositions first")
        masks: dict[int | None, ir.Value] = {}
        for node in [n for n in graph if n.op_type == "Attention"]:
            key = need(node.inputs[1], f"keys of {node.name}")
            window = self._windows[int(str(key.name).split(".")[1])]
            if window not in masks:
                masks[window] = _mask(emit, positions, cache_slots(graph), window)
            node.resize_inputs(4)  # drops nonpad_kv_seqlen
            node.replace_input_with(3, masks[window])
            node.attributes.pop("is_causal", None)
        drop_input(graph, graph_input(graph, "nonpad_kv_seqlen"))
        return ir.passes.PassResult(model, True)


def _mask(emit: Emitter, positions: ir.Value, cache_length: int, window: int | None) -> ir.Value:
    batch, tokens = shape_of(positions)
    column, full = [batch, 1, tokens, 1], [batch, 1, tokens, cache_length]
    name = "mask" if window is None else f"mask_window_{window}"
    keys = emit.constant("cache_slots", np.arange(cache_length, dtype=np.int64).reshape(1, 1, 1, cache_length))
    axes = emit.constant("axes_1_3", np.array([1, 3], np.int64))
    query = emit("Unsqueeze", positions, axes, name=f"{name}/query", dtype=_I64, shape=column)
    causal = emit("LessOrEqual", keys, query, name=f"{name}/causal", dtype=_BOOL, shape=full)
    if window is None or window >= cache_length:
        return causal
    width = emit.constant(f"window_{window}", np.array(window, np.int64))
    start = emit("Sub", query, width, name=f"{name}/start", dtype=_I64, shape=column)
    near = emit("Greater", keys, start, name=f"{name}/near", dtype=_BOOL, shape=full)
    return emit("And", causal, near, name=name, dtype=_BOOL, shape=full)
