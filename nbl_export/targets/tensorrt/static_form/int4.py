"""Turns decoder matrices into int4 blocks behind a DequantizeLinear (drawn in `graph.quantised`).

The embedding and the lm_head stay as they are. Gather reads them too if they are tied, and a coarse head costs more
quality than it saves. The int4 of the ONNX Runtime engine has blocks of 32 too.
"""

from __future__ import annotations

import onnx_ir as ir

from nbl_export.graph.quantised import quantize_weight

__all__ = ["INT4_BLOCK", "BlockInt4"]

INT4_BLOCK = 32
_KEPT = "lm_head"


class BlockInt4(ir.passes.InPlacePass):
    """Quantise every MatMul weight that divides into blocks along K, except the lm_head's."""

    def __init__(self, block: int = INT4_BLOCK) -> None:
        super().__init__()
        self._block = block

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        matrices = [n for n in model.graph if n.op_type == "MatMul" and not _is_head(n)]
        done = [node for node in matrices if quantize_weight(model.graph, node, self._block)]
        return ir.passes.PassResult(model, bool(done))


def _is_head(node: ir.Node) -> bool:
    weight = node.inputs[1]
    return _KEPT in (node.name or "") or (weight is not None and _KEPT in (weight.name or ""))
