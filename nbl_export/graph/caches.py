"""Finds the key/value caches among the graph inputs, and their layers, from the dataflow instead of names.

    past i --+                                   past i --+
    new k  --+-- Concat (the merge) -- present i          +-- GroupQueryAttention (the merge) -- present i

A cache output leads back to its input through data moves and one merge: the node that adds the new tokens.
The merge of layer i + 1 needs the attention of layer i. So the merges in graph order are the layers in order, two a
layer. Names only number the layers, because a rewritten graph has gaps. Names that contradict the order are refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.emitter import values_read
from nbl_export.graph.names import OWN_NODES
from nbl_export.records.decoder import HYBRID

__all__ = ["LayerCaches", "graph_caches", "is_static", "present_names"]

LayerCaches = tuple[tuple[ir.Value, ...], tuple[ir.Value, ...]]  # pasts (key, value), presents (key, value)

# Attention operators that hold a cache: present output -> past input.
_ATTENTION = {
    "Attention": {1: 4, 2: 5},
    "GroupQueryAttention": {1: 3, 2: 4},
    "MultiHeadAttention": {1: 6, 2: 7},
    "SparseAttention": {1: 3, 2: 4},
}
_MERGES = ("Concat", "ScatterND", "ScatterElements", "TensorScatter")
_MOVES = ("Identity", "Cast", "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Slice", "Expand",
          "QuantizeLinear", "DequantizeLinear")  # fmt: skip
_LEAST_RANK = 3
_STATE = re.compile(r"^past(_key_values)?\.\d+\.(conv|recurrent)(_state)?$")  # of the GenAI builder
_DIGITS = re.compile(r"\d{1,9}")


@dataclass(frozen=True)
class _Pair:
    past: ir.Value
    present: ir.Value
    merge: ir.Node
    slot: int


def is_static(graph: ir.Graph) -> bool:
    """Whether a graph has the static form: it is told which slots to write, and gets no mask of the sequence."""
    return {"input_ids", "write_indices"} <= {str(value.name) for value in graph.inputs}


def graph_caches(graph: ir.Graph) -> dict[int, LayerCaches]:
    """Cache inputs and outputs by layer, ascending; the key comes before the value.

    Raises:
        RefusalError: the graph has no caches, a layer has other than two, or names contradict the order of the graph.
    """
    _refuse_control_flow(graph)
    for value in (value for value in graph.inputs if _STATE.match(str(value.name))):
        raise RefusalError(None, f"its input {value.name} is the state of a layer without attention: {HYBRID}")
    order = {node: index for index, node in enumerate(graph)}
    found = sorted(_pairs(graph), key=lambda pair: (order[pair.merge], pair.slot))
    if not found:
        raise RefusalError(
            None, "none of its inputs and outputs are key/value caches; only decoders with caches can be rewritten"
        )
    groups = [_key_first(found[i : i + 2]) for i in range(0, len(found), 2)]
    layers = _numbers(groups)
    _refuse_unpaired(graph, found, layers)
    return {
        layer: (tuple(pair.past for pair in group), tuple(pair.present for pair in group))
        for layer, group in zip(layers, groups, strict=True)
    }


def present_names(graph: ir.Graph, without: Collection[int] = ()) -> dict[str, str]:
    """Name of each cache input -> name of the output that feeds it in the next step; `without`: layers to skip."""
    caches = [pair for layer, pair in graph_caches(graph).items() if layer not in without]
    return {str(a.name): str(b.name) for pasts, presents in caches for a, b in zip(pasts, presents, strict=True)}


def _refuse_control_flow(graph: ir.Graph) -> None:
    """Refuse branches that read values of the outer graph and so hide the dataflow; tables by length are accepted.

    The rewrite's own branches are accepted too: `_trace` looks into them.
    """
    for node in graph:
        given = {value for value in node.inputs if value is not None}
        if not str(node.name).startswith(OWN_NODES) and any(value not in given for value in values_read(node)):
            raise RefusalError(
                None,
                f"its {node.op_type} node {node.name} chooses between parts of the decoder (a merged export?); "
                "use the export whose one graph always takes caches",
            )


def _pairs(graph: ir.Graph) -> Iterator[_Pair]:
    for present in graph.outputs:
        found = {id(pair.past): pair for pair in _trace(present, present, None, set())}
        if len(found) > 1:
            names = " and ".join(str(pair.past.name) for pair in found.values())
            raise RefusalError(None, f"its output {present.name} comes from several caches, {names}")
        yield from found.values()


def _trace(
    value: ir.Value, present: ir.Value, merge: tuple[ir.Node, int] | None, seen: set[ir.Value]
) -> Iterator[_Pair]:
    """Trace an output back to graph inputs, through moves and merges."""
    if value in seen:
        return
    seen.add(value)
    if value.is_graph_input():
        if merge is not None and not value.is_initializer() and _can_hold_a_cache(value):
            yield _Pair(value, present, *merge)
        return
    node = value.producer()
    if node is None:
        return
    if node.op_type == "If":
        yield from _trace_branch(node, value, present)
        return
    if node.op_type in _ATTENTION:
        slot = _ATTENTION[node.op_type].get(value.index() or 0)
        sources = [] if slot is None else list(node.inputs[slot : slot + 1])
        merge = (node, slot or 0)
    elif node.op_type in _MERGES:
        sources = list(node.inputs if node.op_type == "Concat" else node.inputs[:1])
        merge = (node, 0)
    elif node.op_type in _MOVES:
        sources = list(node.inputs[:1])
    else:
        return
    for source in sources:
        if source is not None:
            yield from _trace(source, present, merge, seen)


def _trace_branch(choice: ir.Node, value: ir.Value, present: ir.Value) -> Iterator[_Pair]:
    """Trace an output of the rewrite's own choice in its second branch, the original's; the choice is the merge."""
    branch = choice.attributes.get("else_branch")
    index = value.index() or 0
    if branch is None or branch.type != ir.AttributeType.GRAPH or index >= len(branch.as_graph().outputs):
        return  # a damaged graph
    for pair in _trace(branch.as_graph().outputs[index], present, None, set()):
        yield _Pair(pair.past, present, choice, pair.slot)


def _can_hold_a_cache(value: ir.Value) -> bool:
    counts = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
    return value.dtype not in counts and (value.shape is None or len(value.shape) >= _LEAST_RANK)


def _key_first(group: Sequence[_Pair]) -> list[_Pair]:
    """The key first, by words in the names; in the order of the graph if the names do not say which is the key.

    Words that both names have equally often do not count: `past_key_values.0.value` has "key" and "values" too.
    """
    words = [Counter(re.split(r"[^a-z]+", str(pair.past.name).lower())) for pair in group]
    if len(group) == 2 and (words[1] - words[0]).keys() & {"key", "keys", "k"}:
        return [group[1], group[0]]
    return list(group)


def _numbers(groups: Sequence[Sequence[_Pair]]) -> list[int]:
    """The layer of each group: the number in its names, or its index if the names have none or count single caches."""
    numbers = [[[int(d) for d in _DIGITS.findall(str(pair.past.name))] for pair in group] for group in groups]
    flat = [name[0] if name else -1 for group in numbers for name in group]
    if all(n == -1 for n in flat) or (len(flat) > 1 and flat == list(range(flat[0], flat[0] + len(flat)))):
        return list(range(len(groups)))
    for place in range(min(len(name) for group in numbers for name in group)):
        layers = [{name[place] for name in group} for group in numbers]
        agreed = [next(iter(layer)) for layer in layers if len(layer) == 1]
        if len(agreed) == len(groups) and agreed == sorted(set(agreed)):
            return agreed
    first = next((i for i, group in enumerate(numbers) if len({tuple(n[:1]) for n in group}) > 1), 0)
    names = ", ".join(str(pair.past.name) for pair in groups[first])
    raise RefusalError(first, f"it does not have one key and one value cache, both as input and output ({names})")


def _refuse_unpaired(graph: ir.Graph, found: Sequence[_Pair], layers: Sequence[int]) -> None:
    """Refuse an odd number of caches, and inputs that are named like caches but that no output continues."""
    if len(found) % 2:
        layer = layers[-1]
        name = found[-1].past.name
        raise RefusalError(layer, f"it does not have one key and one value cache, both as input and output ({name})")
    paired = {pair.past for pair in found}
    for value in graph.inputs:
        named = re.search(r"past_?key|key_?cache|value_?cache", str(value.name))
        if named and value not in paired and _can_hold_a_cache(value):
            raise RefusalError(None, f"its input {value.name} is named like a cache, but no output continues it")
