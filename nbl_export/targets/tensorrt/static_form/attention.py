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
from nbl_export.graph.emitter import Maker, drop_input, graph_input, need, shape_of, size, type_of

__all__ = ["POSITIONS", "DerivedPositions", "ExplicitMasks", "HeadMajorCaches", "TrimRotaryTables"]

_CACHE = re.compile(r"(key|value)_cache\.(\d+)$")
_KEPT_ATTRIBUTES = ("scale", "softcap", "is_causal")


class HeadMajorCaches(ir.passes.InPlacePass):
    """Bring caches and attention to [B, heads, slots, head], and name the caches as the rewrite knows them."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        make = Maker(model.graph, output="")
        attentions = [n for n in model.graph if n.op_type == "Attention"]
        for node in attentions:
            _rebuild(make, node)
        model.graph.remove(attentions, safe=True)
        model.graph.extend(make.nodes)
        return ir.passes.PassResult(model, bool(attentions))


def _rebuild(make: Maker, node: ir.Node) -> None:
    query, key, value = (need(v, f"query, key and value of {node.name}") for v in node.inputs[:3])
    q_heads, kv_heads = (node.attributes.get_int(f"{part}_num_heads") for part in ("q", "kv"))
    if not q_heads or not kv_heads:
        raise RefusalError(None, f"{node.name} is not a three-dimensional Attention with its numbers of heads")
    head, _ = (_rebuild_cache(make, cache, kv_heads) for cache in (key, value))
    layer = node.name or ""
    by_head = _to_heads(make, query, q_heads, head, f"{layer}/query")
    attributes = {name: a.value for name, a in node.attributes.items() if name in _KEPT_ATTRIBUTES}
    attention = make("Attention", f"{layer}/heads", by_head, *node.inputs[1:], **attributes)
    token_major = make("Transpose", f"{layer}/token_major", attention, perm=[0, 2, 1, 3])
    width = q_heads * head
    shape = make.constant(f"shape_0_0_{width}", [0, 0, width])
    dims = [*shape_of(query)[:2], width]
    out = make("Reshape", f"{layer}/out", token_major, shape, dtype=node.outputs[0].dtype, shape=dims)
    node.outputs[0].replace_all_uses_with(out)


def _rebuild_cache(make: Maker, updated: ir.Value, kv_heads: int) -> int:
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
    scatter.replace_input_with(1, _to_heads(make, update, kv_heads, head, f"{scatter.name}/update"))
    scatter.attributes["axis"] = ir.AttrInt64("axis", 2)
    kind, index = match.groups()
    dtype = type_of(cache)
    for value, name in ((cache, f"past_key_values.{index}.{kind}"), (updated, f"present.{index}.{kind}")):
        value.name = name
        value.shape = ir.Shape([batch, kv_heads, cache_length, head])
        value.dtype = dtype
    return head


def _to_heads(make: Maker, value: ir.Value, heads: int, head: int, name: str) -> ir.Value:
    """[B, T, heads*head] -> [B, heads, T, head]."""
    shape = make.constant(f"shape_0_0_{heads}_{head}", [0, 0, heads, head])
    return make("Transpose", name, make("Reshape", f"{name}/split", value, shape), perm=[0, 2, 1, 3])


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
        make = Maker(graph, output="")
        positions = next((o for n in graph for o in n.outputs if o.name == POSITIONS), None)
        if positions is None:
            raise RefusalError(None, "it has no positions, which the masks need; run DerivedPositions first")
        masks: dict[int | None, ir.Value] = {}
        for node in [n for n in graph if n.op_type == "Attention"]:
            key = need(node.inputs[1], f"keys of {node.name}")
            window = self._windows[int(str(key.name).split(".")[1])]
            if window not in masks:
                masks[window] = _mask(make, positions, size(key, 2), window)
            node.resize_inputs(4)  # drops nonpad_kv_seqlen
            node.replace_input_with(3, masks[window])
            node.attributes.pop("is_causal", None)
        graph.extend(make.nodes)
        drop_input(graph, graph_input(graph, "nonpad_kv_seqlen"))
        return ir.passes.PassResult(model, True)


def _mask(make: Maker, positions: ir.Value, cache_length: int, window: int | None) -> ir.Value:
    batch, tokens = shape_of(positions)
    column = [batch, 1, tokens, 1]
    full = [batch, 1, tokens, cache_length]
    name = "mask" if window is None else f"mask_window_{window}"
    keys = make.constant("cache_slots", np.arange(cache_length).reshape(1, 1, 1, cache_length))
    axes = make.constant("axes_1_3", [1, 3])
    query = make("Unsqueeze", f"{name}/query", positions, axes, dtype=_I64, shape=column)
    causal = make("LessOrEqual", f"{name}/causal", keys, query, dtype=_BOOL, shape=full)
    if window is None or window >= cache_length:
        return causal
    width = make.constant(f"window_{window}", window)
    start = make("Sub", f"{name}/start", query, width, dtype=_I64, shape=column)
    in_window = make("Greater", f"{name}/in_window", keys, start, dtype=_BOOL, shape=full)
    return make("And", name, causal, in_window, dtype=_BOOL, shape=full)


class TrimRotaryTables(ir.passes.InPlacePass):
    """Shorten the cos and sin tables to the slots of the cache; run after `DerivedPositions`."""

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
        make = Maker(graph, dtype=_I64, output="")
        given = graph_input(graph, "position_ids")
        ids = graph_input(graph, "input_ids")
        write = graph_input(graph, "write_indices")
        slots = size(graph_input(graph, "past_key_values.0.key"), 2)
        batch, tokens = shape_of(ids)
        count = make("Shape", "positions/count", ids, shape=[1], start=1, end=2)
        stop = make("Squeeze", "positions/stop", count, make.constant("axis_0", [0]), shape=[])
        zero = make.constant("zero", 0)
        steps = make("Range", "positions/steps", zero, stop, make.constant("one", 1), shape=[tokens])
        base = make("Unsqueeze", "positions/base", write, make.constant("axis_1", [1]), shape=[batch, 1])
        free = make("Add", "positions/free", base, steps, shape=[batch, tokens])
        positions = make("Min", POSITIONS, free, make.constant("last_slot", slots - 1), shape=[batch, tokens])
        graph.extend(make.nodes)
        given.replace_all_uses_with(positions)
        drop_input(graph, given)
        return ir.passes.PassResult(model, True)
