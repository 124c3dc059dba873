"""Above the last kept attention layer no token reads another, so only the last token is computed there, in an IR.

    before   x ------------------------ join -- mlp -- ... -- lm_head -> logits [B, T, V]
             attention -- o_proj -------^
    after    x -- Gather(last) -------- join -- mlp -- ... -- lm_head -> logits [B, 1, V]
             attention -- Gather(last) -- o_proj -^

The last token is the last column, as in a batch that is padded on the left. A runtime that gives each token a row of
its own (the paged back end of OpenVINO GenAI) sees one column, so the gather does nothing there.
Refuses a tail in which anything but the two inputs depends on the tokens.
"""

from __future__ import annotations

from typing import Any

from nbl_export.errors import RefusalError
from nbl_export.targets.openvino.ir.anatomy import Dataflow

__all__ = ["prune_tail"]

_TOKENS = 1  # axis of the tokens, in [batch, tokens, hidden size]


def prune_tail(model: Any) -> None:
    """Gather the last token in front of the last kept layer's o_proj and residual join, in place.

    Raises:
        RefusalError: the tail depends on the tokens in another way.
    """
    from openvino import opset13 as ops

    flow = Dataflow(model)
    block = flow.block(max(flow.states))
    ends = (block.product.input(block.data), block.join.input(1 - block.branch))
    _check_tail(flow, block.layer, block)
    for end, name in zip(ends, ("attention", "residual"), strict=True):
        last = ops.constant([-1], dtype="int64", name=f"/nbl/last/{name}/index")
        axis = ops.constant(_TOKENS, dtype="int64", name=f"/nbl/last/{name}/axis")
        end.replace_source_output(ops.gather(end.get_source_output(), last, axis, name=f"/nbl/last/{name}").output(0))
    model.validate_nodes_and_infer_types()


def _check_tail(flow: Dataflow, layer: int, block: Any) -> None:
    """Every node behind the two ends depends on the inputs of the model through these ends alone."""
    tail = flow.below([block.product, block.join])
    for node in flow.nodes:
        if node.get_name() not in tail:
            continue
        for place, value in enumerate(node.input_values()):
            ends = {block.product.get_name(): block.data, block.join.get_name(): 1 - block.branch}
            is_end = ends.get(node.get_name()) == place
            if not is_end and value.get_node().get_name() not in tail and not flow.is_constant(value):
                raise RefusalError(
                    layer,
                    f"{node.get_friendly_name()} behind its attention reads {value.get_node().get_friendly_name()}",
                )
