"""What makes an ONNX decoder slow at reading prompts in ONNX Runtime.

    head        logits of all tokens, though generation needs those of the last token
    attention   products and a Softmax in place of one node: ONNX Runtime stores the scores of all pairs of tokens
    level       MatMulNBits rounds activations to int8 only at accuracy_level 4 (matmul_nbits.cc, GetComputeType)
    blocks      each block of weights has a scale of its own, and sums of int8 products end with the block
    float       no product has quantised weights

The last three are of ONNX Runtime's kernels for CPUs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import onnx_ir as ir

from nbl_export.graph.anatomy import is_constant
from nbl_export.graph.emitter import values_read
from nbl_export.graph.names import OWN_NODES
from nbl_export.records.findings import BLOCK, Finding

__all__ = ["find_slow"]

_FLOAT = ("MatMul", "Gemm", "FusedMatMul")
# Products with quantised weights, and the input that holds these weights.
_QUANTISED = {"MatMulNBits": 1, "MatMulBnb4": 1, "MatMulInteger": 1, "MatMulIntegerToFloat": 1,
              "DynamicQuantizeMatMul": 1, "QLinearMatMul": 3, "QMoE": 2}  # fmt: skip
_TAKES_TOKENS = ("Gather", "GatherND", "Slice")
_READS_ONLY_SHAPE = ("Shape", "Size")
_INT8 = 4  # accuracy_level


def find_slow(graph: ir.Graph, *, on_cpu: bool) -> list[Finding]:
    """The traits of a decoder graph that slow the reading of prompts.

    Args:
        on_cpu: whether the graph is for a CPU; traits that cost only there are left out otherwise.
    """
    products = {node for node in graph if _is_product(node)}
    found = [*_head(graph, products), *_attention(graph, products)]
    if on_cpu:
        found += [*_level(products), *_blocks(products), *_floats(products)]
    return found


def _is_product(node: ir.Node) -> bool:
    """Whether a node multiplies activations by a matrix of weights."""
    place = 1 if node.op_type in _FLOAT else _QUANTISED.get(node.op_type)
    if place is None or len(node.inputs) <= place:
        return False
    weights = node.inputs[place]
    return weights is not None and is_constant(weights) and not _is_vector(weights)


def _is_vector(weights: ir.Value) -> bool:
    return weights.const_value is not None and len([d for d in weights.const_value.shape.numpy() if d > 1]) < 2


def _above(values: Iterable[ir.Value], stop: Collection[ir.Node]) -> Iterator[ir.Node]:
    """Nodes that values are computed from, up to nodes of `stop`, which are given too; shapes are not followed."""
    waiting = list(values)
    seen = set()
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in seen or node.op_type in _READS_ONLY_SHAPE:
            continue
        seen.add(node)
        yield node
        if node not in stop:
            waiting.extend(values_read(node))


def _head(graph: ir.Graph, products: Collection[ir.Node]) -> Iterator[Finding]:
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    if logits is None or (logits.shape is not None and len(logits.shape) == 3 and logits.shape[1] == 1):
        return
    behind = list(_above([logits], products))
    heads = [node for node in behind if node in products]
    before = _above([_given(head)[0] for head in heads], products)
    if heads and not any(map(_takes_tokens, [*behind, *before])):
        yield Finding(
            "the head computes logits of all tokens of a prompt",
            len(heads),
            "export with the logits of the last token: prune_lm_head=true of the GenAI builder; nbl-export does it by "
            "default",
        )


def _takes_tokens(node: ir.Node) -> bool:
    if node.op_type not in _TAKES_TOKENS or node.inputs[0] is None or is_constant(node.inputs[0]):
        return False
    source = node.inputs[0].producer()
    return source is None or source.op_type not in _READS_ONLY_SHAPE


def _attention(graph: ir.Graph, products: Collection[ir.Node]) -> Iterator[Finding]:
    """A Softmax of a product of two computed values is attention; that of a router of experts has weights above it.

    Nodes of this tool are left out: above an exit layer they attend few queries, in a form that no fused node has.
    """
    scores = {node for node in graph if node.op_type in (*_FLOAT, "Einsum") and not any(map(is_constant, _given(node)))}
    ends = {*products, *scores}
    softmaxes = (n for n in graph if n.op_type == "Softmax" and not str(n.name).startswith(OWN_NODES))
    found = [node for node in softmaxes if not scores.isdisjoint(_above(_given(node), ends))]
    if found:
        yield Finding(
            "attention is products and a Softmax, not one fused node",
            len(found),
            "export with GroupQueryAttention, as the GenAI builder writes it, or with MultiHeadAttention or Attention",
        )


def _given(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


def _level(products: Collection[ir.Node]) -> Iterator[Finding]:
    found = [node for node in _of_blocks(products) if node.attributes.get_int("accuracy_level", 0) != _INT8]
    if found:
        yield Finding(
            "MatMulNBits multiplies activations in float: accuracy_level is not 4",
            len(found),
            "set accuracy_level to 4 (accuracy_level=4 of the GenAI builder): activations in int8; measure the loss",
        )


def _blocks(products: Collection[ir.Node]) -> Iterator[Finding]:
    sizes = [node.attributes.get_int("block_size", 0) for node in _of_blocks(products)]
    small = [size for size in sizes if size < BLOCK]
    if small:
        yield Finding(
            f"blocks are small: {' or '.join(map(str, sorted(set(small))))} weights share a scale",
            len(small),
            f"quantise in blocks of {BLOCK} (block_size of the GenAI builder) at accuracy_level 4; measure the loss",
        )


def _of_blocks(products: Collection[ir.Node]) -> Sequence[ir.Node]:
    return [node for node in products if node.op_type == "MatMulNBits"]


def _floats(products: Collection[ir.Node]) -> Iterator[Finding]:
    if products and all(node.op_type in _FLOAT and not _is_rounded(node.inputs[1]) for node in products):
        yield Finding(
            "weights are float: no product has quantised weights",
            len(products),
            f"quantise to int8 or int4 in blocks of {BLOCK} with accuracy_level 4; measure the loss",
        )


def _is_rounded(weights: ir.Value | None) -> bool:
    return weights is not None and any(node.op_type == "DequantizeLinear" for node in _above([weights], ()))
