"""Cuts a decoder of the static form behind its first attention.

    before   ids -- embedding -- ... -- [join] -- mlp -- ... -- lm_head -> logits [B, T, V]     caches 0 .. K-1
    after    ids -- embedding -- ... -- [join] -> logits [B, T, D]                              the caches of one layer

The residual stream takes the name of the logits, so whatever runs a decoder runs the result. Linearized layers in
front of the first attention stay. The weights stay in the file that they are in.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import cache_layers, find_block
from nbl_export.graph.emitter import shape_of, type_of
from nbl_export.graph.passes import run_passes

__all__ = ["KeepFirstAttention", "cut"]

_LOGITS = "logits"


class KeepFirstAttention(ir.passes.InPlacePass):
    """Make the residual stream behind the first attention the only output beside that layer's caches.

    Refuses a graph whose residual additions are no plain additions, or that gives the last token's logits alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        block = find_block(graph, cache_layers(graph)[0])
        if block.join.op_type != "Add":
            raise RefusalError(block.layer, f"its residual addition is a {block.join.op_type}, not an Add")
        if any(value.name == "num_tokens" for value in graph.inputs):
            raise RefusalError(None, "it gives the logits of the last token alone; cut the graph with all logits")
        for output in graph.outputs:
            if output.name == _LOGITS:
                output.name = f"{_LOGITS}_of_all_layers"
        joined = block.join.outputs[0]
        joined.name = _LOGITS
        if joined.dtype is None:
            joined.dtype = type_of(block.pasts[0])
        ids = next(value for value in graph.inputs if value.name == "input_ids")
        if joined.shape is None and block.residual.shape is not None:
            joined.shape = ir.Shape([*shape_of(ids), block.residual.shape[-1]])
        graph.outputs[:] = [joined, *block.presents]
        caches = [v for v in graph.inputs if (v.name or "").startswith("past_key_values.")]
        dropped = [v for v in caches if v not in block.pasts]
        common.RemoveUnusedNodesPass()(model)
        graph.inputs[:] = [v for v in graph.inputs if v not in dropped]
        return ir.passes.PassResult(model, modified=True)


def cut(graph: Path) -> bytes:
    """The cut graph as an ONNX file, which reads its weights from the data file of `graph`.

    Raises:
        RefusalError: see `KeepFirstAttention`.
    """
    model = ir.load(graph)
    run_passes((KeepFirstAttention(),), model)
    serialised: bytes = ir.to_proto(model).SerializeToString()
    return serialised
