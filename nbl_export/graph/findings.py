"""What makes an ONNX decoder slow at reading prompts in ONNX Runtime.

    head        logits of all tokens, though generation needs those of the last token
    attention   products and a Softmax in place of one node: ONNX Runtime stores the scores of all pairs of tokens
    level       MatMulNBits rounds activations to int8 only at accuracy_level 4 (matmul_nbits.cc, GetComputeType)
    blocks      each block of weights has a scale of its own, and sums of int8 products end with the block
    float       no product has quantised weights

The last three are of ONNX Runtime's kernels for CPUs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from nbl_export.graph.emitter import values_read
from nbl_export.graph.names import OWN_NODES
from nbl_export.records.findings import BLOCK, Finding

__all__ = ["find_slow"]

_FLOAT = ("MatMul", "Gemm", "FusedMatMul")
# Products with quantised weights, and the input that holds these weights.
_QUANTISED = {"MatMulNBits": 1, "MatMulBnb4": 1, "MatMulInteger": 1, "MatMulIntegerToFloat": 1,
              "DynamicQuantizeMatMul": 1, "QLinearMatMul": 3, "RowwiseMatMul": 2, "QMoE": 2}  # fmt: skip
_TAKES_TOKENS = ("Gather", "GatherND", "Slice")
_READS_ONLY_SHAPE = ("Shape", "Size")
_INT8 = 4  # accuracy_level


def find_slow(graph: ir.Graph, *, on_cpu: bool) -> list[Finding]:
    """The traits of a decoder graph that slow the reading of prompts.

    Args:
        on_cpu: whether the graph is for a CPU; traits that cost only there are left out otherwise.
    """
    flow = _Flow(graph)
    found = [*_head(graph, flow), *_attention(flow)]
    if on_cpu:
        found += [*_level(flow), *_blocks(flow), *_floats(flow)]
    return found


class _Flow:
    """What is computed from what, in one walk; a product with weights begins anew.

    Attributes:
        products: nodes that multiply activations by a matrix of weights.
        floats: those whose weights were never quantised.
        attention: each Softmax of a product of two computed values. That of a router of experts has weights before it.
            Nodes of this tool are left out: above an exit layer they attend few queries, in a form without fused node.
        chosen: values that are computed from a choice among tokens, and products of such values.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.products: list[ir.Node] = []
        self.floats: list[ir.Node] = []
        self.attention: list[ir.Node] = []
        self.chosen: set[ir.Value | ir.Node] = set()
        self._constant: set[ir.Value] = set(graph.initializers.values())
        self._dequantised: set[ir.Value] = set()
        self._scores: set[ir.Value] = set()
        for node in graph:
            self._visit(node, list(values_read(node)))

    def _visit(self, node: ir.Node, given: list[ir.Value]) -> None:
        if self._constant.issuperset(given):
            self._constant.update(node.outputs)
            if node.op_type == "DequantizeLinear" or not self._dequantised.isdisjoint(given):
                self._dequantised.update(node.outputs)
        elif (weights := self._weights(node)) is not None:
            self.products.append(node)
            if node.op_type in _FLOAT and weights not in self._dequantised:
                self.floats.append(node)
            if not self.chosen.isdisjoint(given):
                self.chosen.add(node)
        elif node.op_type not in _READS_ONLY_SHAPE:
            self._mark(node, given)

    def _mark(self, node: ir.Node, given: list[ir.Value]) -> None:
        is_product = node.op_type in (*_FLOAT, "Einsum") and self._constant.isdisjoint(given)
        behind = not self._scores.isdisjoint(given)
        if is_product or behind:
            self._scores.update(node.outputs)
        if behind and node.op_type == "Softmax" and not str(node.name).startswith(OWN_NODES):
            self.attention.append(node)
        if self._takes_tokens(node) or not self.chosen.isdisjoint(given):
            self.chosen.update(node.outputs)

    def _weights(self, node: ir.Node) -> ir.Value | None:
        """The matrix of weights of a product; None for other nodes."""
        place = 1 if node.op_type in _FLOAT else _QUANTISED.get(node.op_type)
        weights = None if place is None or len(node.inputs) <= place else node.inputs[place]
        return weights if weights in self._constant and not _is_vector(weights) else None

    def _takes_tokens(self, node: ir.Node) -> bool:
        source = node.inputs[0] if node.op_type in _TAKES_TOKENS else None
        if source is None or source in self._constant:
            return False
        maker = source.producer()
        return maker is None or maker.op_type not in _READS_ONLY_SHAPE


def _is_vector(weights: ir.Value | None) -> bool:
    if weights is None or weights.const_value is None:
        return False
    return len([length for length in weights.const_value.shape.numpy() if length > 1]) < 2


def _head(graph: ir.Graph, flow: _Flow) -> Iterator[Finding]:
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    if logits is None or (logits.shape is not None and len(logits.shape) == 3 and logits.shape[1] == 1):
        return
    heads = set(flow.products) & set(_above(logits, set(flow.products)))
    if heads and logits not in flow.chosen and flow.chosen.isdisjoint(heads):
        yield Finding(
            "the head computes logits of all tokens of a prompt",
            len(heads),
            "export with the logits of the last token: prune_lm_head=true of the GenAI builder; nbl-export does it by "
            "default",
        )


def _above(value: ir.Value, stop: Collection[ir.Node]) -> Iterator[ir.Node]:
    """Nodes that a value is computed from, up to nodes of `stop`, which are given too."""
    waiting = [value]
    seen = set()
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node not in stop:
            waiting.extend(values_read(node))


def _attention(flow: _Flow) -> Iterator[Finding]:
    if flow.attention:
        yield Finding(
            "attention is products and a Softmax, not one fused node",
            len(flow.attention),
            "export with GroupQueryAttention, as the GenAI builder writes it, or with MultiHeadAttention or Attention",
        )


def _level(flow: _Flow) -> Iterator[Finding]:
    found = [node for node in _of_blocks(flow) if node.attributes.get_int("accuracy_level", 0) != _INT8]
    if found:
        yield Finding(
            "MatMulNBits multiplies activations in float: accuracy_level is not 4",
            len(found),
            "set accuracy_level to 4 (accuracy_level=4 of the GenAI builder): activations in int8; measure the loss",
        )


def _blocks(flow: _Flow) -> Iterator[Finding]:
    sizes = [node.attributes.get_int("block_size", 0) for node in _of_blocks(flow)]
    small = [size for size in sizes if size < BLOCK]
    if small:
        yield Finding(
            f"blocks are small: {' or '.join(map(str, sorted(set(small))))} weights share a scale",
            len(small),
            f"quantise in blocks of {BLOCK} (block_size of the GenAI builder) at accuracy_level 4; measure the loss",
        )


def _of_blocks(flow: _Flow) -> list[ir.Node]:
    return [node for node in flow.products if node.op_type == "MatMulNBits"]


def _floats(flow: _Flow) -> Iterator[Finding]:
    if flow.products and len(flow.floats) == len(flow.products):
        yield Finding(
            "weights are float: no product has quantised weights",
            len(flow.floats),
            f"quantise to int8 or int4 in blocks of {BLOCK} with accuracy_level 4; measure the loss",
        )
