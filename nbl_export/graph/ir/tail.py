"""Leaves all rows but the last one out behind the last attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbl_export.graph.ir.anatomy import Block, Dataflow

__all__ = ["prune_tail"]

_TOKENS = 1  # axis of the tokens, in [batch, tokens, width]


def prune_tail(model: Any) -> None:
    """Gather the last row in front of o_proj and residual join of the last layer with attention, in place.

        before   x ------------------------ join -- mlp -- ... -- lm_head -> logits [B, T, V]
                 attention -- o_proj -------^
        after    x -- Gather(last) -------- join -- mlp -- ... -- lm_head -> logits [B, 1, V]
                 attention -- Gather(last) -- o_proj -^

    The last row is the last column, as in a batch that is padded on the left. A runtime that gives each token a row of
    its own (the paged back end of OpenVINO GenAI) sees one column, so the gather does nothing there.

    If nodes behind the last attention read something else of the tokens, the gather stands in front of lm_head alone.
    """
    from openvino import opset13 as ops

    flow = Dataflow(model)
    block = flow.block(max(flow.states))
    reads_more = _foreign(flow, block)
    last, data = block.last
    ends = {"attention": last.input(data), "residual": block.join.input(1 - block.branch)}
    for title, end in ({"head": flow.head().input(0)} if reads_more else ends).items():
        taken = ops.gather(
            end.get_source_output(),
            ops.constant([-1], dtype=np.int64),
            ops.constant(_TOKENS, dtype=np.int64),
            name=f"/nbl/last/{title}",
        )
        end.replace_source_output(taken.output(0))
    if not reads_more:
        _resize(flow, block)
    model.validate_nodes_and_infer_types()


def _resize(flow: Dataflow, block: Block) -> None:
    """Give experts behind a block, which restore the shape of an early hidden state, that of the row that is left."""
    from openvino import opset13 as ops

    behind = flow.below([block.join])
    for node in flow.nodes:
        for port in node.inputs() if node.get_name() in behind else ():
            value = port.get_source_output()
            if value.get_node().get_name() not in behind and _is_shape(value, block):
                kind = value.get_element_type().to_string()
                port.replace_source_output(ops.shape_of(block.residual, kind).output(0))


def _is_shape(value: Any, block: Block) -> bool:
    """Whether a value is the shape of a hidden state, of any number of rows."""
    node = value.get_node()
    if node.get_type_name() != "ShapeOf":
        return False
    own = node.get_input_partial_shape(0)
    other = block.residual.get_partial_shape()
    return bool(own.rank == other.rank and own[-1] == other[-1])


def _foreign(flow: Dataflow, block: Block) -> bool:
    """Whether a node behind the two ends of a block depends on the inputs of the model in another way too."""
    last, data = block.last
    tail = flow.below([last, block.join])
    ends = {(last.get_name(), data), (block.join.get_name(), 1 - block.branch)}
    for node in flow.nodes:
        if node.get_name() not in tail:
            continue
        for place, value in enumerate(node.input_values()):
            name = value.get_node().get_name()
            is_end = (node.get_name(), place) in ends
            foreign = name not in tail and not flow.is_constant(value)
            if foreign and not is_end and not _is_shape(value, block):
                return True
    return False
