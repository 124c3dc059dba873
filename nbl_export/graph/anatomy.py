"""Finds the attention block of each decoder layer in a graph, from the dataflow alone.

    residual x ----------------------------+
        |                                  v
        +-- norm -- q,k,v -- attention -- [join] -- ...        join: Add or Skip(Simplified)LayerNormalization
                       past i ---^   `--- present i

The search begins at the cache inputs of a layer (`caches`) and ends at the residual join. The join is the first
addition at which all paths from the layer's caches have come together. Its other operand feeds the attention.
Node names play no part. Norm, rotary embedding and attention may be one operator each or dozens. Reading the shape of
a cache is not dataflow, because all layers share the past length and the masks made from it.

"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.caches import graph_caches
from nbl_export.graph.emitter import ancestors, need, values_read
from nbl_export.graph.passes.skip_norms import SKIP_NORMS

__all__ = [
    "PRODUCTS",
    "AttentionBlock",
    "Written",
    "cache_layers",
    "find_attention",
    "find_block",
    "find_written",
    "graph_caches",
    "is_constant",
    "key_steps",
]

# Operators that multiply activations by weights, or that quantise activations for such a product.
PRODUCTS = ("MatMul", "Gemm", "MatMulNBits", "MatMulBnb4", "MatMulInteger", "QLinearMatMul", "FusedMatMul",
            "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "RowwiseMatMul", "DynamicQuantizeLinear",
            "QuantizeLinear")  # fmt: skip
_TAKES_TOKENS = ("Gather", "GatherND", "Slice")
_READS_ONLY_SHAPE = ("Shape", "Size")
_DEPTH = 8
_KEY_STEPS = ("Cast", "Reshape", "SimplifiedLayerNormalization", "RMSNormalization")  # between keys and their attention
_KEY_ENDS = ("Add", "Split", *PRODUCTS)  # what gives keys


@dataclass(frozen=True)
class AttentionBlock:
    """One layer's attention: its caches, and the join at which its output meets the residual stream."""

    layer: int
    join: ir.Node
    branch_index: int  # which input of `join` is the layer's output
    pasts: tuple[ir.Value, ...]
    presents: tuple[ir.Value, ...]
    projected: tuple[ir.Value, ...]  # inputs of the block's first products (q, k, v)
    normed: ir.Value | None  # the only projected value, if it is not the residual and the join takes all tokens

    @property
    def branch(self) -> ir.Value:
        """The layer's output, as the join adds it to the residual."""
        return need(self.join.inputs[self.branch_index], f"an output of layer {self.layer}")

    @property
    def residual(self) -> ir.Value:
        """The other operand, the layer's input."""
        return need(self.join.inputs[1 - self.branch_index], f"an input of layer {self.layer}")


@dataclass(frozen=True)
class Written:
    """How a layer of the static form writes its cache.

    Attributes:
        rotary: the node that rotates keys [B, T, K].
        keys, values: the nodes that split what is written into heads; their first input is [B, T, K].
    """

    rotary: ir.Node
    keys: ir.Node
    values: ir.Node


def cache_layers(graph: ir.Graph) -> tuple[int, ...]:
    """Layers that keep a cache, ascending."""
    return tuple(graph_caches(graph))


def find_block(graph: ir.Graph, layer: int) -> AttentionBlock:
    """Locate the attention block of a layer.

    Raises:
        RefusalError: the graph has no such layer, or the layer's dataflow is not an attention block.
    """
    caches = graph_caches(graph)
    if layer not in caches:
        raise RefusalError(layer, f"the graph has caches for layers {list(caches)} only")
    pasts, presents = caches[layer]
    join, reached = _find_join(graph, layer, pasts, presents)
    index = next(i for i, v in enumerate(join.inputs[:2]) if v in reached)
    branch = join.inputs[index]
    residual = join.inputs[1 - index]
    assert branch is not None and residual is not None
    projected = _projected(residual, branch, join)
    if not projected:
        raise RefusalError(
            layer,
            f"{join.name or join.op_type} adds its attention output to {residual.name}, which the attention is not "
            "computed from; a layer whose MLP runs beside its attention cannot be replaced",
        )
    usable = len(projected) == 1 and projected[0] is not residual and _whole(residual) is residual
    normed = projected[0] if usable else None
    return AttentionBlock(layer, join, index, pasts, presents, projected, normed)


def find_attention(block: AttentionBlock) -> ir.Node:
    """The operator that takes a block's keys and its cache. It rotates keys, if its attribute do_rotary is 1.

    Raises:
        RefusalError: no such operator; the block joins keys with its cache.
    """
    for node in block.pasts[0].consumers():
        if node.op_type == "GroupQueryAttention":
            return node
    raise RefusalError(block.layer, "its attention is no GroupQueryAttention, so it takes no other keys")


def key_steps(layer: int, attention: ir.Node) -> tuple[ir.Node, ...]:
    """The nodes between a layer's product of keys and its attention, in their order.

    Raises:
        RefusalError: something else than a norm stands there.
    """
    found: list[ir.Node] = []
    node = None if attention.inputs[1] is None else attention.inputs[1].producer()
    while node is not None and node.op_type in _KEY_STEPS:
        found.append(node)
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None or node.op_type not in _KEY_ENDS:
        raise RefusalError(layer, f"its keys come by {node.op_type if node else 'no node'}, and not by a product")
    return tuple(reversed(found))


def find_written(block: AttentionBlock) -> Written:
    """The nodes that bring a block's keys and values to its cache, in the static form.

    Raises:
        RefusalError: keys are not rotated by a RotaryEmbedding, or something else is written.
    """
    found = []
    for past in block.pasts:
        node = next((user for user in past.consumers() if user.op_type == "TensorScatter"), None)
        for index, op_type in ((1, "Transpose"), (0, "Reshape")):
            value = None if node is None else node.inputs[index]
            node = None if value is None else value.producer()
            node = node if node is not None and node.op_type == op_type else None
        if node is None:
            raise RefusalError(block.layer, f"{past.name} does not get rows of tokens, so it takes no others")
        found.append(node)
    keys, values = found
    rotary = None if keys.inputs[0] is None else keys.inputs[0].producer()
    if rotary is None or rotary.op_type != "RotaryEmbedding":
        raise RefusalError(block.layer, "its keys are not rotated by RotaryEmbedding, so it takes no others")
    return Written(rotary, keys, values)


def is_constant(value: ir.Value, depth: int = _DEPTH) -> bool:
    """Whether a value is an initializer, or computed from initializers alone (for example a transposed tied head)."""
    producer = value.producer()
    if value.is_initializer() or value.const_value is not None:
        return True
    if producer is None or depth == 0:
        return False
    return all(v is None or is_constant(v, depth - 1) for v in producer.inputs)


def _projected(residual: ir.Value, branch: ir.Value, join: ir.Node) -> tuple[ir.Value, ...]:
    """Inputs of the first products on the paths to the branch.

    Paths begin at the residual, at the normed output of a skip norm that makes the residual, or at the value that the
    residual was gathered from.
    """
    whole = _whole(residual)
    starts = [whole]
    beside = whole.producer()
    if beside is not None and beside.op_type in SKIP_NORMS:
        starts.append(beside.outputs[0])
    needed = ancestors(branch, set(starts), without=_READS_ONLY_SHAPE)
    found: dict[ir.Value, None] = {}
    seen: set[ir.Value] = set()
    while starts:
        value = starts.pop()
        if value in seen or value not in needed:
            continue
        seen.add(value)
        for node in value.consumers():
            if node is join or node.op_type in _READS_ONLY_SHAPE or not any(v in needed for v in node.outputs):
                continue
            if node.op_type in PRODUCTS:
                found[value] = None
            else:
                starts.extend(node.outputs)
    return tuple(found)


def _whole(residual: ir.Value) -> ir.Value:
    """The residual of all tokens; in a graph with a pruned tail (`graph.passes.tail`) the join reads a gather of it."""
    node = residual.producer()
    taken = node is not None and node.op_type in _TAKES_TOKENS
    source = node.inputs[0] if taken and node is not None else None
    return residual if source is None or is_constant(source) else source


def _find_join(
    graph: ir.Graph, layer: int, pasts: tuple[ir.Value, ...], presents: tuple[ir.Value, ...]
) -> tuple[ir.Node, set[ir.Value]]:
    """The first residual addition through which every path from the layer's caches passes, and the values before it."""
    reached = set(pasts)
    last = None
    for node in graph:
        if node.op_type in _READS_ONLY_SHAPE or not any(v in reached for v in values_read(node)):
            continue
        if _is_residual_add(node, reached):
            if _is_only_door(graph, node, reached, presents):
                return node, reached
            last = node
        reached.update(node.outputs)
    seen = "" if last is None else f" (the last addition looked at is {last.name or last.outputs[0].name})"
    raise RefusalError(
        layer, f"no residual addition gathers the attention output; the block's end is not understood{seen}"
    )


def _is_residual_add(node: ir.Node, reached: set[ir.Value]) -> bool:
    if node.op_type != "Add" and node.op_type not in SKIP_NORMS:
        return False
    pair = node.inputs[:2]
    inside = [v for v in pair if v in reached]
    outside = [v for v in pair if v is not None and v not in reached]
    return len(inside) == 1 and len(outside) == 1 and not is_constant(outside[0])


def _is_only_door(graph: ir.Graph, door: ir.Node, reached: set[ir.Value], presents: tuple[ir.Value, ...]) -> bool:
    """Whether reached values leave through `door` alone; present caches may also leave as graph outputs."""
    if any(value.is_graph_output() and value not in presents for value in reached):
        return False
    for user in graph:
        if user is door or user.op_type in _READS_ONLY_SHAPE or not any(v in reached for v in values_read(user)):
            continue
        others = [output for output in user.outputs if output not in reached]
        if any(v.consumers() or (v.is_graph_output() and v not in presents) for v in others):
            return False
    return True
