"""Brings caches to head-major order and attention to four dimensions with one output, as TensorRT's parser requires.

    before   key_cache.i [B, S, Hkv*head] -- TensorScatter(axis 1) -- updated_key_cache.i
                                                   `-- Attention(3-D; K, V; nonpad) -> out, (present), (present)
    after    past_key_values.i.key [B, Hkv, S, head] -- TensorScatter(axis 2) -- present.i.key
                                                   `-- Attention(4-D; K, V; nonpad) -> out
             with Reshape + Transpose around q, the new k and v, and out

TensorRT-RTX 1.7 refuses a 3-D cache ("past_cache tensor is required to be 4D, got 3D") and an Attention with
present outputs ("TensorRT only supports Attention nodes with one output"). The runner decides which memory an output
is bound to; the names say which input and output belong together. Refuses an Attention whose keys and values do not
come directly from a TensorScatter on a graph input that mobius has named.

Builds one boolean mask for each distinct window; layers with the same window share it.

    before   Attention(q, K, V, -, ..., nonpad_kv_seqlen; is_causal=1)
    after    Attention(q, K, V, mask [B, 1, T, S]);  mask = slot <= position  [and slot > position - window]

TensorRT silently ignores nonpad_kv_seqlen; only its builder mentions an "Unused Input". TensorRT counts is_causal from
the upper left corner, where a decode token would see slot 0 alone. So this pass removes both. The mask alone is correct
for chunks, for padding and for rows of different lengths: everything behind a row's own position is masked. Masked
values must be finite (0 x NaN is NaN), so caches start zeroed.

mobius' static-cache graph drops a sliding window; this pass restores it from the checkpoint's configuration. The
window counts the token itself, as in transformers: `masking_utils.sliding_window_overlay` keeps kv > q - window.

Trims rotary tables to the rows that a cache of S slots can reach.

    before   Gather(cos [max_positions, head/2], positions)      after   Gather(cos [S, head/2], positions)

A model of 131072 positions carries 2 x 33 MB of tables; a cache of 2048 slots needs 0.5 MB of them. Refuses a
cache with more slots than the model has positions.

Computes positions from the slots that tokens are written to.

    before   inputs input_ids [B, T], position_ids [B, T], write_indices [B]
    after    inputs input_ids [B, T], write_indices [B];  positions[b, t] = min(write_indices[b] + t, S - 1)

The slot of a token is its position, so there is one source of truth. The clamp changes only padding behind the last
slot, whose rows nobody reads. Without the clamp the rotary lookup of this padding would be out of bounds: ONNX Runtime
stops, and a GPU reads whatever lies there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.emitter import Emitter, cache_slots, drop_input, graph_input, need, shape_of, size, type_of

__all__ = ["POSITIONS", "DerivedPositions", "ExplicitMasks", "HeadMajorCaches", "TrimRotaryTables"]

_CACHE = re.compile(r"(key|value)_cache\.(\d+)$")
_KEPT_ATTRIBUTES = ("scale", "softcap", "is_causal")


class HeadMajorCaches(ir.passes.InPlacePass):
    """Bring caches and attention to [B, heads, slots, head], and name the caches as the rewrite knows them."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        emit = Emitter(model.graph)
        attentions = [n for n in model.graph if n.op_type == "Attention"]
        for node in attentions:
            _rebuild(emit, node)
        model.graph.remove(attentions, safe=True)
        return ir.passes.PassResult(model, bool(attentions))


def _rebuild(emit: Emitter, node: ir.Node) -> None:
    query, key, value = (need(v, f"query, key and value of {node.name}") for v in node.inputs[:3])
    q_heads, kv_heads = (node.attributes.get_int(f"{part}_num_heads") for part in ("q", "kv"))
    if not q_heads or not kv_heads:
        raise RefusalError(None, f"{node.name} is not a three-dimensional Attention with its numbers of heads")
    head, _ = (_rebuild_cache(emit, cache, kv_heads) for cache in (key, value))
    layer = node.name or ""
    inputs = [_to_heads(emit, query, q_heads, head, f"{layer}/query"), *node.inputs[1:]]
    attributes = {name: a.value for name, a in node.attributes.items() if name in _KEPT_ATTRIBUTES}
    attention = emit("Attention", *inputs, name=f"{layer}/heads", **attributes)
    token_major = emit("Transpose", attention, name=f"{layer}/token_major", perm=[0, 2, 1, 3])
    width = q_heads * head
    shape = emit.constant(f"shape_0_0_{width}", np.array([0, 0, width], np.int64))
    dims = [*shape_of(query)[:2], width]
    out = emit("Reshape", token_major, shape, name=f"{layer}/out", dtype=node.outputs[0].dtype, shape=dims)
    node.outputs[0].replace_all_uses_with(out)


def _rebuild_cache(emit: Emitter, updated: ir.Value, kv_heads: int) -> int:
    """Bring one TensorScatter and its cache to head-major order; returns the head size."""
    scatter = updated.producer()
    if scatter is None or scatter.op_type != "TensorScatter":
        raise RefusalError(None, "an Attention does not read its keys and values from TensorScatter")
    cache, update = (need(v, f"cache and update of {scatter.name}") for v in scatter.inputs[:2])
    match = _CACHE.search(cache.name or "")
    if match is None or not cache.is_graph_input():
        raise RefusalError(
            None, f"the cache of {scatter.name} is not a graph input called key_cache.N or value_cache.N"
        )
    batch, cache_length, _ = shape_of(cache)
    head = size(cache, 2) // kv_heads
    scatter.replace_input_with(1, _to_heads(emit, update, kv_heads, head, f"{scatter.name}/update"))
    scatter.attributes["axis"] = ir.AttrInt64("axis", 2)
    kind, index = match.groups()
    dtype = type_of(cache)
    for value, name in ((cache, f"past_key_values.{index}.{kind}"), (updated, f"present.{index}.{kind}")):
        value.name = name
        value.shape = ir.Shape([batch, kv_heads, cache_length, head])
        value.dtype = dtype
    return head


def _to_heads(emit: Emitter, value: ir.Value, heads: int, head: int, name: str) -> ir.Value:
    """[B, T, heads*head] -> [B, heads, T, head]."""
    shape = emit.constant(f"shape_0_0_{heads}_{head}", np.array([0, 0, heads, head], np.int64))
    split = emit("Reshape", value, shape, name=f"{name}/split")
    return emit("Transpose", split, name=name, perm=[0, 2, 1, 3])


_BOOL = ir.DataType.BOOL
_I64 = ir.DataType.INT64


class ExplicitMasks(ir.passes.InPlacePass):
    """Give every Attention its mask; run after `DerivedPositions`.

    Args:
        windows: window of each layer in tokens; None if the layer sees all tokens.
    """

    def __init__(self, windows: Sequence[int | None]) -> None:
        super().__init__()
        self._windows = tuple(windows)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        emit = Emitter(model.graph)
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
    column = [batch, 1, tokens, 1]
    full = [batch, 1, tokens, cache_length]
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


class TrimRotaryTables(ir.passes.InPlacePass):
    """Cut the cos and sin tables to the slots of the cache; run after `DerivedPositions`."""

    def __init__(self, cache_length: int) -> None:
        super().__init__()
        self._slots = cache_length

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        tables = []
        for node in model.graph:
            if node.op_type != "Gather":
                continue
            table, index = (need(v, f"inputs of {node.name}") for v in node.inputs)
            if index.name == POSITIONS:
                tables.append(table)
        changed = [self._trim(table) for table in dict.fromkeys(tables)]
        return ir.passes.PassResult(model, any(changed))

    def _trim(self, table: ir.Value) -> bool:
        full = table.const_value
        if full is None:
            raise RefusalError(None, f"the rotary table {table.name} is not an initializer")
        rows = size(table, 0)
        if rows < self._slots:
            raise RefusalError(
                None, f"the model has {rows} positions, fewer than the {self._slots} cache slots asked for"
            )
        if rows == self._slots or any(use.node.op_type != "Gather" for use in table.uses()):
            return False
        table.const_value = ir.tensor(full.numpy()[: self._slots].copy(), dtype=full.dtype, name=table.name)
        table.shape = ir.Shape([self._slots, *shape_of(table)[1:]])
        return True


POSITIONS = "positions"


class DerivedPositions(ir.passes.InPlacePass):
    """Replace the input position_ids by computed positions; run after `HeadMajorCaches`."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        emit = Emitter(model.graph)
        given = graph_input(graph, "position_ids")
        ids = graph_input(graph, "input_ids")
        write = graph_input(graph, "write_indices")
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
