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
"""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.emitter import Emitter, need, shape_of, size, type_of

__all__ = ["HeadMajorCaches"]

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
    attributes = [a for k, a in node.attributes.items() if k in _KEPT_ATTRIBUTES]
    attention = ir.Node("", "Attention", inputs, attributes, name=f"{layer}/heads")
    attention.outputs[0].name = f"{layer}/heads"
    emit.add(attention)
    token_major = emit("Transpose", attention.outputs[0], name=f"{layer}/token_major", perm=[0, 2, 1, 3])
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
