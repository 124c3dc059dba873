"""Puts mixers in place of attention; the tap names the value x.

    before   x -- norm -- qkv -- GroupQueryAttention -- o_proj -+      after   x -- MatMul(W') -- Add(b) -+
             x -------------------------------------------- join               x -------------------- join

The nodes are the mixer's own (`methods.base`). If it gives no output, the join goes, and its readers get x.
This pass removes no nodes, because exporters share rotary tables, masks and shape values across layers. The old block
only loses its reader (see `DropCaches` and `SkipNormToAdd`). Refuses a join that `anatomy` cannot find.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import AttentionBlock, find_block
from nbl_export.graph.emitter import element_type, new_node
from nbl_export.graph.names import node_name
from nbl_export.graph.passes.skip_norms import SKIP_NORMS, SUM, bias_of
from nbl_export.methods.base import OWN, Mixer, Port, tapped
from nbl_export.methods.linear.builder import GraphBuilder

__all__ = ["RewriteBlocks"]


class RewriteBlocks(ir.passes.InPlacePass):
    """Put mixers into layers. They add their own nodes by a `GraphBuilder`."""

    def __init__(self, mixers: Mapping[int, Mixer], tap: str = "residual") -> None:
        super().__init__()
        self.mixers = mixers
        self.tap = tap

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for block in [find_block(graph, layer) for layer in sorted(self.mixers)]:
            layer = block.layer
            mixer = self.mixers[block.layer]
            _check_same_size(block, mixer)
            x = tapped(block, self.tap)
            build = GraphBuilder(graph, layer, element_type(graph, block.residual), x.shape)
            given = mixer.emit(build, {OWN: x})
            if Port.OUTPUT in given:
                graph.insert_before(block.join, build.nodes)
                block.join.replace_input_with(block.branch_index, given[Port.OUTPUT])
            else:
                _pass_on(graph, block)
        return ir.passes.PassResult(model, modified=bool(self.mixers))


def _check_same_size(block: AttentionBlock, mixer: Mixer) -> None:
    width = block.branch.shape[-1] if block.branch.shape is not None else None
    if isinstance(width, int) and width != mixer.size:
        raise RefusalError(block.layer, f"its attention output is {width} wide, the map {mixer.size}")


def _pass_on(graph: ir.Graph, block: AttentionBlock) -> None:
    """Give the readers of a join the residual alone: nothing is added to it.

    before   y -- SkipSimplifiedLayerNormalization(x, y) -> normed, sum      after   SimplifiedLayerNormalization(x)
    """
    join = block.join
    x = block.residual
    if (bias := bias_of(join)) is not None:
        add = new_node("Add", [x, bias], node_name(block.layer, "Add"), x.dtype, x.shape)
        graph.insert_before(join, [add])
        x = add.outputs[0]
    if join.op_type != "Add":
        _norm_alone(graph, join, x, node_name(block.layer, "norm"))
    for total in join.outputs[:1] if join.op_type == "Add" else join.outputs[SUM:]:
        total.replace_all_uses_with(x)
    graph.remove(join, safe=True)


def _norm_alone(graph: ir.Graph, skip: ir.Node, value: ir.Value, name: str) -> None:
    """Give the readers of a skip norm's normed output a norm of `value`, made in the place of the skip norm."""
    if skip.op_type not in SKIP_NORMS or not skip.outputs[0].consumers():
        return
    weights = skip.inputs[2 : 3 if skip.op_type == "SkipSimplifiedLayerNormalization" else 4]
    epsilon = skip.attributes["epsilon"].as_float()
    old = skip.outputs[0]
    dtype = value.dtype or element_type(graph, value)
    attributes = {"axis": -1, "stash_type": 1, "epsilon": epsilon}
    norm = new_node(SKIP_NORMS[skip.op_type], [value, *weights], name, dtype, old.shape, attributes)
    graph.insert_before(skip, [norm])
    old.replace_all_uses_with(norm.outputs[0])
