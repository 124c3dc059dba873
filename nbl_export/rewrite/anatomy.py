"""Where the attention block of each decoder layer sits in a graph, found from the dataflow alone.

    residual x ----------------------------+
        |                                  v
        +-- norm -- q,k,v -- attention -- [join] -- ...        join: Add or Skip(Simplified)LayerNormalization
                       past i ---^   `--- present i

Anchors are the cache inputs of a layer (by their names, the one convention all exporters keep) and the residual
join: the first addition behind which every path from the layer's caches has come together. Exporters' node names
play no part. Reading a cache's shape is not dataflow: the past length and the masks made from it are shared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from nbl_export.errors import RefusalError

__all__ = ["AttentionBlock", "cache_layers", "find_block", "graph_caches"]

_PAST = re.compile(r"^past_key_values\.(\d+)\.(key|value)$")
_PRESENT = re.compile(r"^present\.(\d+)\.(key|value)$")
_SKIP_NORMS = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")
_NORMS = ("RMSNormalization", "SimplifiedLayerNormalization", "LayerNormalization")
_READS_ONLY_SHAPE = ("Shape", "Size")


@dataclass(frozen=True)
class AttentionBlock:
    """One layer's attention: its caches, and the join where its output meets the residual stream."""

    layer: int
    pasts: tuple[ir.Value, ...]
    presents: tuple[ir.Value, ...]
    join: ir.Node
    branch_index: int  # which input of `join` is the attention output
    residual: ir.Value
    normed: ir.Value | None  # what the block's norm makes of the residual; None where no norm operator is found


def graph_caches(graph: ir.Graph) -> dict[int, tuple[tuple[ir.Value, ...], tuple[ir.Value, ...]]]:
    """Cache inputs and outputs by layer, ascending.

    Raises:
        RefusalError: a layer has only some of its four.
    """
    pasts, presents = _by_layer(graph.inputs, _PAST), _by_layer(graph.outputs, _PRESENT)
    if not pasts:
        raise RefusalError(None, "it has no past_key_values.N.key inputs; only decoders with a cache are rewritten")
    for layer in sorted({*pasts, *presents}):
        if len(pasts.get(layer, ())) != 2 or len(presents.get(layer, ())) != 2:
            raise RefusalError(layer, "it does not have one key and one value cache, both as input and output")
    return {layer: (tuple(pasts[layer]), tuple(presents[layer])) for layer in sorted(pasts)}


def cache_layers(graph: ir.Graph) -> tuple[int, ...]:
    """Layers that keep a cache, ascending."""
    return tuple(graph_caches(graph))


def _by_layer(values: Iterable[ir.Value], pattern: re.Pattern[str]) -> dict[int, list[ir.Value]]:
    found: dict[int, list[ir.Value]] = {}
    for value in values:
        if match := pattern.match(value.name or ""):
            found.setdefault(int(match[1]), []).append(value)
    return found


def find_block(graph: ir.Graph, layer: int) -> AttentionBlock:
    """Locate the attention block of a layer.

    Raises:
        RefusalError: there is no such layer, or its dataflow is not that of an attention block.
    """
    caches = graph_caches(graph)
    if layer not in caches:
        raise RefusalError(layer, f"the graph has caches for layers {list(caches)} only")
    pasts, presents = caches[layer]
    join = _find_join(graph, layer, pasts, presents)
    reached = _descendants(graph, pasts, stop=join)
    branches = [i for i, v in enumerate(join.inputs[:2]) if v in reached]
    residual = join.inputs[1 - branches[0]]
    assert residual is not None
    return AttentionBlock(layer, pasts, presents, join, branches[0], residual, _find_normed(residual, join))


def _find_normed(residual: ir.Value, join: ir.Node) -> ir.Value | None:
    """The output of the one norm that reads the residual before the join, or makes it on the side."""
    beside = residual.producer()
    norms = [n for n in residual.consumers() if n is not join and n.op_type in (*_NORMS, *_SKIP_NORMS)]
    if beside is not None and beside.op_type in _SKIP_NORMS:
        norms.append(beside)
    return norms[0].outputs[0] if len(norms) == 1 else None


def _descendants(graph: ir.Graph, sources: Iterable[ir.Value], stop: ir.Node | None = None) -> set[ir.Value]:
    """Values computed from the sources, in nodes before `stop`."""
    reached = set(sources)
    for node in graph:
        if node is stop:
            break
        if node.op_type not in _READS_ONLY_SHAPE and any(v in reached for v in node.inputs):
            reached.update(node.outputs)
    return reached


def _find_join(graph: ir.Graph, layer: int, pasts: tuple[ir.Value, ...], presents: tuple[ir.Value, ...]) -> ir.Node:
    """The first residual addition through which everything that the layer's caches reach must pass."""
    reached = set(pasts)
    for node in graph:
        if node.op_type in _READS_ONLY_SHAPE or not any(v in reached for v in node.inputs):
            continue
        if _is_residual_add(node, reached) and _is_only_door(node, reached, presents):
            return node
        reached.update(node.outputs)
    raise RefusalError(layer, "no residual addition gathers the attention output; the block's end is not understood")


def _is_residual_add(node: ir.Node, reached: set[ir.Value]) -> bool:
    if node.op_type != "Add" and node.op_type not in _SKIP_NORMS:
        return False
    pair = node.inputs[:2]
    inside = [v for v in pair if v in reached]
    outside = [v for v in pair if v is not None and v not in reached]
    return len(inside) == 1 and len(outside) == 1 and outside[0].const_value is None and not _is_constant(outside[0])


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return value.is_initializer() or (producer is not None and producer.op_type == "Constant")


def _is_only_door(door: ir.Node, reached: set[ir.Value], presents: tuple[ir.Value, ...]) -> bool:
    """No value reached so far is read beside or beyond this node; present caches may leave as graph outputs."""
    for value in reached:
        for user in value.consumers():
            if user is door or user.op_type in _READS_ONLY_SHAPE:
                continue
            if any(_is_open(output, presents) for output in user.outputs if output not in reached):
                return False
        if value.is_graph_output() and value not in presents:
            return False
    return True


def _is_open(value: ir.Value, presents: tuple[ir.Value, ...]) -> bool:
    return bool(value.consumers()) or (value.is_graph_output() and value not in presents)
