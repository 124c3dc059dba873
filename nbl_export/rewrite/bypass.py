"""Feeds a replaced layer's residual join with a mixer's output instead of its attention; the tap names the value x.

    before   x -- norm -- qkv -- GroupQueryAttention -- o_proj -+      after   x -- MatMul(W') -- Add(b) -+
             x -------------------------------------------- join                x -------------------- join

The nodes are the mixer's own (`mixers`, `builder`). If it adds nothing, the join goes, and its readers get x.
This pass removes no nodes, because exporters share rotary tables, masks and shape values across layers. The old block
only loses its reader (see `caches`, `SkipNormToAdd` and `Sweep`). Refuses a join that `anatomy` cannot find.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import AttentionBlock, find_block
from nbl_export.graph.emitter import element_type
from nbl_export.graph.names import node_name
from nbl_export.mixers.base import Mixer
from nbl_export.rewrite.builder import GraphBuilder, ValidTokens

__all__ = ["BypassAttention", "SkipNormToAdd", "Sweep", "norm_alone", "tapped"]

_NORMS = {"SkipSimplifiedLayerNormalization": "SimplifiedLayerNormalization",
          "SkipLayerNormalization": "LayerNormalization"}  # fmt: skip
_SUM = 3  # output of a skip norm: the residual stream


class BypassAttention(ir.passes.InPlacePass):
    """Replace the attention of layers by mixers, which add their own nodes (`builder`)."""

    def __init__(self, mixers: Mapping[int, Mixer], tap: str = "residual") -> None:
        super().__init__()
        self.mixers = mixers
        self.tap = tap

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        blocks = [find_block(graph, layer) for layer in sorted(self.mixers)]
        valid: ValidTokens | None = None
        for block in blocks:
            mixer = self.mixers[block.layer]
            _check_same_size(block, mixer)
            dtype, x = element_type(graph, block.residual), tapped(block, self.tap)
            if mixer.state is not None and valid is None:
                valid = ValidTokens(graph, dtype)
            build = GraphBuilder(graph, block.layer, x, dtype, valid if mixer.state is not None else None)
            output = mixer.emit(build, build.x)
            if output is None:
                _pass_on(graph, block)
                continue
            graph.insert_before(block.join, build.nodes)
            block.join.replace_input_with(block.branch_index, output)
        return ir.passes.PassResult(model, modified=bool(blocks))


def tapped(block: AttentionBlock, tap: str) -> ir.Value:
    """The value that a map acts on.

    Raises:
        RefusalError: the tap is "normed" and the block has no normed input.
    """
    if tap == "residual":
        return block.residual
    if block.normed is None:
        raise RefusalError(
            block.layer,
            "its attention does not multiply one normed value first, which tap normed needs; use tap residual",
        )
    return block.normed


def _check_same_size(block: AttentionBlock, mixer: Mixer) -> None:
    width = block.branch.shape[-1] if block.branch.shape is not None else None
    if isinstance(width, int) and width != mixer.size:
        raise RefusalError(block.layer, f"its attention output is {width} wide, the map {mixer.size}")


def _pass_on(graph: ir.Graph, block: AttentionBlock) -> None:
    """Give the readers of a join the residual alone: nothing is added to it.

    before   y -- SkipSimplifiedLayerNormalization(x, y) -> normed, sum      after   SimplifiedLayerNormalization(x)
    """
    join, x = block.join, block.residual
    if (bias := _bias_of(join)) is not None:
        add = ir.node("Add", [x, bias], name=node_name(block.layer, "Add"))
        add.outputs[0].name, add.outputs[0].type, add.outputs[0].shape = f"{add.name}/output_0", x.type, x.shape
        graph.insert_before(join, [add])
        x = add.outputs[0]
    if join.op_type != "Add":
        norm_alone(graph, join, x, node_name(block.layer, "norm"))
    for total in join.outputs[:1] if join.op_type == "Add" else join.outputs[_SUM:]:
        total.replace_all_uses_with(x)
    graph.remove(join, safe=True)


def norm_alone(graph: ir.Graph, skip: ir.Node, value: ir.Value, name: str) -> None:
    """Give the readers of a skip norm's normed output a norm of `value`, made in the place of the skip norm.

    The norm's weight may be computed (1 + weight in graphs of mobius), behind the first node of the graph.
    """
    if skip.op_type not in _NORMS or not skip.outputs[0].consumers():
        return
    weights = skip.inputs[2 : 3 if skip.op_type == "SkipSimplifiedLayerNormalization" else 4]
    attributes = {"axis": -1, "stash_type": 1, "epsilon": skip.attributes["epsilon"].as_float()}
    norm = ir.node(_NORMS[skip.op_type], [value, *weights], attributes=attributes, name=name)
    normed, old = norm.outputs[0], skip.outputs[0]
    normed.type = value.type or ir.TensorType(element_type(graph, value))
    normed.name, normed.shape = f"{name}/output_0", old.shape
    graph.insert_before(skip, [norm])
    old.replace_all_uses_with(normed)


Sweep = RemoveUnusedNodesPass  # unread nodes and initializers


class SkipNormToAdd(ir.passes.InPlacePass):
    """Turn a skip norm whose sum alone is read into an Add, or into two if it has a bias input.

        before   SkipSimplifiedLayerNormalization(skip, x) -> (unread, , , sum)      after   Add(skip, x) -> sum

    No node reads the input norm of a replaced layer. But the fused operator of the norm also computes the residual
    stream, so its addition stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in model.graph if _only_sum_is_read(node)]
        for node in found:
            left, right, bias = node.inputs[0], node.inputs[1], _bias_of(node)
            total = node.outputs[_SUM]
            terms = [(left, right)] if bias is None else [(left, right), (None, bias)]
            adds: list[ir.Node] = []
            for a, b in terms:
                adds.append(ir.node("Add", [a if a is not None else adds[-1].outputs[0], b], name=f"{node.name}/Add"))
                adds[-1].outputs[0].name = f"{total.name}/sum{len(adds)}"
            last = adds[-1].outputs[0]
            last.type, last.shape = total.type, total.shape
            model.graph.insert_before(node, adds)
            total.replace_all_uses_with(last)
            model.graph.remove(node, safe=True)
            last.name = total.name
        return ir.passes.PassResult(model, modified=bool(found))


def _only_sum_is_read(node: ir.Node) -> bool:
    if node.op_type not in _NORMS or len(node.outputs) <= _SUM:
        return False
    *others, total = node.outputs[: _SUM + 1]
    read = [v for v in others if v.consumers() or v.is_graph_output()]
    return not read and bool(total.consumers()) and not total.is_graph_output()


def _bias_of(node: ir.Node) -> ir.Value | None:
    """The bias that a skip norm adds to its sum."""
    if node.op_type not in _NORMS:
        return None
    index = 3 if node.op_type == "SkipSimplifiedLayerNormalization" else 4
    return node.inputs[index] if len(node.inputs) > index else None
