"""Leaves rows out behind the last layer that reads far: one row is left, or the few that windows at the top need.

    tokens of a step     t0  t1  t2 ...................................................... last
    enter window 0       t0                       | 2 (W - 1) + 1 rows ................... last     of two windows
    enter window 1       t0                                              | W rows ........ last
    leave window 1                                                                         last

The rows are those of `rewrite.window_tail`, which says why they suffice. A batch is padded on the left, so the last
rows are the same columns of every sequence. The first token of a text is a row of its own if it is not among these.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from nbl_export.errors import RefusalError
from nbl_export.graph.names import node_name, state_names
from nbl_export.mixers.rows import Read, Rows, rows_of_top
from nbl_export.targets.openvino.ir.anatomy import Dataflow, Join, memories_of, variable_of
from nbl_export.targets.openvino.rewrite.nodes import TOKENS, cut, integers, length, places, valid_tokens
from nbl_export.targets.openvino.rewrite.window import VALID, WINDOW, first_token

__all__ = ["prune_tail"]


def prune_tail(model: Any) -> None:
    """Gather rows in front of o_proj and residual join of the last layer that reads far, in place.

        before   x ------------------------ join -- mlp -- ... -- lm_head -> logits [B, T, V]
                 attention -- o_proj -------^
        after    x -- Gather(rows) -------- join -- mlp -- ... -- lm_head -> logits [B, 1, V]
                 attention -- Gather(rows) -- o_proj -^

    Rows are gathered again in front of the join of each window above that layer, and the last row of the top one. A
    runtime that gives each token a row of its own (the paged back end of OpenVINO GenAI) sees one column, so the gather
    of the last row does nothing there.

    Raises:
        RefusalError: the tail depends on the tokens in another way.
    """
    flow = Dataflow(model)
    windows = _top_windows(model, flow)
    joins = [flow.reader(layer) for layer in flow.readers[-1 - len(windows) :]]
    _check_tail(flow, joins, _own(flow, [window.layer for window in windows]))
    valid = valid_tokens(model, windows[0].layer, "/nbl/tail/Valid") if windows else None
    needs = rows_of_top({window.layer: (Read(rows=Rows.WINDOW, tokens=window.tokens),) for window in windows})
    for join, window in zip(joins, windows, strict=False):
        at, valid = _fewer(valid, needs[window.layer].last or 1)
        _take(join, at, f"/nbl/tail/layers.{window.layer}", batch_dims=1)
        for reader in window.valid.output(0).get_target_inputs():
            reader.replace_source_output(valid.output(0))
        _resize(flow, join)
    _take(joins[-1], integers([-1]), "/nbl/last", batch_dims=0)
    _resize(flow, joins[-1])
    model.validate_nodes_and_infer_types()


@dataclass(frozen=True)
class _Window:
    """A layer with a window: W, and the node that says which rows are tokens."""

    layer: int
    tokens: int
    valid: Any


def _top_windows(model: Any, flow: Dataflow) -> list[_Window]:
    """Windows above the last layer that reads far, ascending."""
    names = {node.get_friendly_name(): node for node in flow.nodes}
    reads = {variable_of(n): n for n in flow.nodes if n.get_type_name() == "ReadValue"}
    rows = {layer: reads[name].get_output_partial_shape(0)[TOKENS] for name, layer in memories_of(model).items()}
    found: list[_Window] = []
    for layer in reversed(flow.readers):
        if node_name(layer, WINDOW) not in names:
            break
        found.insert(0, _Window(layer, rows[layer].get_length() - 1, names[node_name(layer, VALID)]))
    return found


def _fewer(valid_BT: Any, most: int) -> tuple[Any, Any]:
    """Places [B, R] of the last `most` rows and of the first one that is a token, and which of these are tokens.

    The first one is a row of its own if rows are left out. It marks that there were tokens before the last rows. In
    later steps no window reads it, since the states hold the first token of the text.
    """
    from openvino import opset13 as ops

    one, count, first = integers([1]), length(valid_BT), first_token(valid_BT)
    kept = ops.minimum(count, integers([most]))
    start = ops.subtract(count, kept)
    extra = ops.minimum(start, one)
    last = ops.broadcast(places(start, count, one), ops.concat([length(first, 0), kept], 0))
    apart = ops.convert(ops.less(first, start), "f32")
    valid = ops.concat([cut(apart, 0, extra), cut(valid_BT, start)], TOKENS)
    return ops.concat([cut(first, 0, extra), last], TOKENS), valid


def _take(join: Join, at: Any, name: str, batch_dims: int) -> None:
    """Gather rows at the two ends of a layer."""
    from openvino import opset13 as ops

    last, data = join.last
    ends = (last.input(data), join.join.input(1 - join.branch))
    for end, title in zip(ends, ("attention", "residual"), strict=True):
        taken = ops.gather(end.get_source_output(), at, integers(TOKENS), batch_dims, name=f"{name}/{title}")
        end.replace_source_output(taken.output(0))


def _resize(flow: Dataflow, join: Join) -> None:
    """Give experts behind a join, which restore the shape of an early hidden state, that of the rows that are left."""
    from openvino import opset13 as ops

    behind = flow.below([join.join])
    for node in flow.nodes:
        for port in node.inputs() if node.get_name() in behind else ():
            value = port.get_source_output()
            if value.get_node().get_name() not in behind and _is_shape(value, join):
                kind = value.get_element_type().to_string()
                port.replace_source_output(ops.shape_of(join.residual, kind).output(0))


def _is_shape(value: Any, join: Join) -> bool:
    """Whether a value is the shape of a hidden state, of any number of rows."""
    node = value.get_node()
    if node.get_type_name() != "ShapeOf":
        return False
    own, other = node.get_input_partial_shape(0), join.residual.get_partial_shape()
    return bool(own.rank == other.rank and own[-1] == other[-1])


def _own(flow: Dataflow, layers: Collection[int]) -> set[str]:
    """Names of the nodes behind the states and the marks of windows."""
    titles = {node_name(layer, VALID) for layer in layers}
    names = {name for layer in layers for name in state_names(layer)}
    reads = [n for n in flow.nodes if n.get_type_name() == "ReadValue" and variable_of(n) in names]
    return flow.below([*reads, *(n for n in flow.nodes if n.get_friendly_name() in titles)])


def _check_tail(flow: Dataflow, joins: list[Join], own: Collection[str]) -> None:
    """Every node behind the ends of the lowest join depends on the inputs of the model through these ends alone.

    Args:
        own: nodes of windows, which read their states and the marks of tokens.
    """
    block = joins[0]
    last, data = block.last
    tail = flow.below([last, block.join])
    ends = {(last.get_name(), data), (block.join.get_name(), 1 - block.branch)}
    for node in flow.nodes:
        if node.get_name() not in tail:
            continue
        for place, value in enumerate(node.input_values()):
            name = value.get_node().get_name()
            is_end = (node.get_name(), place) in ends
            foreign = name not in tail and name not in own and not flow.is_constant(value)
            if foreign and not is_end and not _is_shape(value, block):
                raise RefusalError(
                    block.layer,
                    f"{node.get_friendly_name()} behind its attention reads {value.get_node().get_friendly_name()}",
                )
