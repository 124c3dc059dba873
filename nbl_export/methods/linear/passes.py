"""Puts mixers in place of attention; the tap names the value x.

    before   x -- norm -- qkv -- GroupQueryAttention -- o_proj -+      after   x -- MatMul(W') -- Add(b) -+
             x -------------------------------------------- join               x -------------------- join

If a map adds nothing, the join goes, and its readers get x.
This pass removes no nodes, because exporters share rotary tables, masks and shape values across layers. The old block
only loses its reader (see `DropCaches` and `SkipNormToAdd`). Refuses a join that `anatomy` cannot find.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import AttentionBlock, find_block
from nbl_export.graph.emitter import LayerMaker, element_type
from nbl_export.graph.passes.skip_norms import SKIP_NORMS, SUM, bias_of
from nbl_export.methods.base import Mixer, tapped

__all__ = ["RewriteBlocks"]


class RewriteBlocks(ir.passes.InPlacePass):
    """Put linear layers into layers."""

    def __init__(self, mixers: Mapping[int, Mixer], tap: str = "residual") -> None:
        super().__init__()
        self.mixers = mixers
        self.tap = tap

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for block in [find_block(graph, layer) for layer in sorted(self.mixers)]:
            mixer = self.mixers[block.layer]
            _check_same_size(block, mixer)
            make = LayerMaker(graph, block.layer, element_type(graph, block.residual))
            x = tapped(block, self.tap)
            matrices, vectors = mixer.stored()
            if not matrices:
                _pass_on(make, block)
                continue
            for name, matrix in matrices.items():
                x = make.matmul(x, matrix, name)
            for name, vector in vectors.items():
                x = make.add(x, vector, name)
            block.join.prepend(make.nodes)
            block.join.replace_input_with(block.branch_index, x)
        return ir.passes.PassResult(model, modified=bool(self.mixers))


def _check_same_size(block: AttentionBlock, mixer: Mixer) -> None:
    width = block.branch.shape[-1] if block.branch.shape is not None else None
    if isinstance(width, int) and width != mixer.size:
        raise RefusalError(block.layer, f"its attention output is {width} wide, the map {mixer.size}")


def _pass_on(make: LayerMaker, block: AttentionBlock) -> None:
    """Give the readers of a join the residual alone: nothing is added to it.

    before   y -- SkipSimplifiedLayerNormalization(x, y) -> normed, sum      after   SimplifiedLayerNormalization(x)
    """
    join = block.join
    x = block.residual
    if (bias := bias_of(join)) is not None:
        x = make("Add", "Add", x, bias, shape=x.shape)
    normed = join.outputs[0]
    if join.op_type in SKIP_NORMS and normed.consumers():
        weights = join.inputs[2 : 3 if join.op_type == "SkipSimplifiedLayerNormalization" else 4]
        attributes = {"axis": -1, "stash_type": 1, "epsilon": join.attributes["epsilon"].as_float()}
        alone = make(SKIP_NORMS[join.op_type], "norm", x, *weights, shape=normed.shape, **attributes)
        normed.replace_all_uses_with(alone)
    join.prepend(make.nodes)
    for total in join.outputs[:1] if join.op_type == "Add" else join.outputs[SUM:]:
        total.replace_all_uses_with(x)
    make.graph.remove(join, safe=True)
