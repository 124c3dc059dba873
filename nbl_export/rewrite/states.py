"""Brings states of layers without attention, as exporters write them, to the form that all graphs here have.

    before   x -- CausalConvWithState(past.N.conv) -> y, present.N.conv
    after    x -- Mul(valid) -- CausalConvWithState(past_key_values.N.conv_state) -> y
                    `- Concat(past) -- GatherElements(up to the last valid token) -> present.N.conv_state

    before   LinearAttention(q, k, v, past.N.recurrent, decay, beta) -> y, present.N.recurrent
    after    LinearAttention(q, k, v, past_key_values.N.recurrent_state, decay * valid, beta * valid) -> y, present...

mobius uses the same operators, and has the later names already. States of both run over padding. So a batch of texts of
several lengths would be wrong. Afterwards padding on either side leaves a state as it is. ONNX Runtime GenAI finds
these names in a decoder of any type, also if the layers between have lost their caches. It wants a pair of states in a
layer, so a convolution gets a second state of one zero.

    before   position_ids [3, B, T]         after    position_ids [B, T] -- Concat, three times

Refuses an operator that is given other inputs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.emitter import new_node, register
from nbl_export.graph.names import state_names
from nbl_export.rewrite.tail import LastValid

__all__ = ["MaskStates", "TextPositions"]

_PREFIX, _CONSTANTS = "/nbl/others", "nbl.others"
_PAST = re.compile(r"^past(?:_key_values)?\.(\d+)\.(?:conv|recurrent)(?:_state)?$")
_OF_MOBIUS = "past_key_values."
_CONVOLUTION, _RECURRENCE = "CausalConvWithState", "LinearAttention"
_POSITIONS = "position_ids"
_STATE = 3  # input of both operators
_QUERY, _KEY, _DECAY, _BETA = 0, 1, 4, 5


class TextPositions(ir.passes.InPlacePass):
    """Take positions [B, T] instead of [3, B, T], of which a text has three times the same."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        wide = next((v for v in graph.inputs if v.name == _POSITIONS), None)
        if wide is None or wide.shape is None or len(wide.shape) != 3 or wide.shape[0] != 3:
            return ir.passes.PassResult(model, modified=False)
        text = ir.Value(name=_POSITIONS, type=wide.type, shape=ir.Shape(wide.shape[1:]))
        axis = register(graph, ir.tensor(np.array([0], np.int64), name=f"{_CONSTANTS}.position_axis"))
        kind = wide.dtype or ir.DataType.INT64
        one = new_node("Unsqueeze", [text, axis], f"{_PREFIX}/text_position", kind)
        three = new_node("Concat", [one.outputs[0]] * 3, f"{_PREFIX}/three_positions", kind, wide.shape, {"axis": 0})
        wide.replace_all_uses_with(three.outputs[0])
        graph.inputs[list(graph.inputs).index(wide)] = text
        graph.insert_before(graph[0], [one, three])
        return ir.passes.PassResult(model, modified=True)


class MaskStates(ir.passes.InPlacePass):
    """Rename states, and let no padding into them; a graph without such operators stays as it is."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        found = [node for node in graph if node.op_type in (_CONVOLUTION, _RECURRENCE)]
        if not found:
            return ir.passes.PassResult(model, modified=False)
        valid = _Valid(graph, _past_of(found[0]).dtype or ir.DataType.FLOAT)
        held: dict[int, dict[str, tuple[ir.Value, ir.Value]]] = {}
        for node in found:
            layer, past, present = _layer_of(node), _past_of(node), node.outputs[1]
            held.setdefault(layer, {})[node.op_type] = (past, present)
            if node.op_type == _RECURRENCE:
                for index in (_DECAY, _BETA):
                    _mask(graph, node, index, valid.rows_BT1)
                if str(past.name).startswith(_OF_MOBIUS):  # divides both by their norm, which is 0 at padding
                    for index in (_QUERY, _KEY):
                        _clear(graph, node, index, valid)
                continue
            _mask(graph, node, 0, valid.columns_B1T)
            _keep_last(graph, node, valid, layer)
        for layer, pairs in held.items():
            _name(graph, layer, pairs)
        return ir.passes.PassResult(model, modified=True)


def _past_of(node: ir.Node) -> ir.Value:
    past = node.inputs[_STATE] if len(node.inputs) > _STATE else None
    if past is None or not past.is_graph_input() or len(node.outputs) < 2 or not node.outputs[1].is_graph_output():
        raise RefusalError(None, f"the state of its {node.op_type} {node.name} is no input and output of the graph")
    return past


def _layer_of(node: ir.Node) -> int:
    match = _PAST.match(str(_past_of(node).name))
    if match is None:
        raise RefusalError(None, f"its state {_past_of(node).name} has no name of an exporter")
    return int(match[1])


class _Valid:
    """Which tokens of a chunk are no padding; puts its nodes in front of the graph.

    Attributes:
        rows_BT1, columns_B1T: 1 or 0.
        at: index [B, 1, 1] of the last valid token.
    """

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        last = LastValid(graph, _PREFIX, _CONSTANTS)
        assert last.chunk is not None
        self.at, self._graph = last.at, graph
        self._made: dict[str, ir.Value] = {}
        cast = new_node("Cast", [last.chunk], f"{_PREFIX}/float", dtype, None, {"to": int(dtype)})
        rows, columns = (
            new_node("Unsqueeze", [cast.outputs[0], self.constant(name, axis)], f"{_PREFIX}/{name}", dtype)
            for name, axis in (("rows", [-1]), ("columns", [1]))
        )
        graph.insert_before(graph[0], [*last.index, cast, rows, columns])
        self.rows_BT1, self.columns_B1T = rows.outputs[0], columns.outputs[0]

    def constant(self, name: str, values: Sequence[int]) -> ir.Value:
        """An initializer; the same name gives the same value."""
        if name not in self._made:
            tensor = ir.tensor(np.array(values, np.int64), name=f"{_CONSTANTS}.{name}")
            self._made[name] = register(self._graph, tensor)
        return self._made[name]


def _mask(graph: ir.Graph, node: ir.Node, index: int, valid: ir.Value) -> None:
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None:
        raise RefusalError(_layer_of(node), f"its {node.op_type} has no input {index}")
    masked = new_node("Mul", [value, valid], f"{node.name}/valid_{index}", value.dtype, value.shape)
    graph.insert_before(node, [masked])
    node.replace_input_with(index, masked.outputs[0])


def _clear(graph: ir.Graph, node: ir.Node, index: int, valid: _Valid) -> None:
    """Make an input zero at padding, also if it is no number there."""
    value = node.inputs[index]
    assert value is not None
    kind = ir.DataType.BOOL
    seen = new_node("Cast", [valid.rows_BT1], f"{node.name}/seen_{index}", kind, None, {"to": int(kind)})
    zero = new_node("Sub", [valid.rows_BT1, valid.rows_BT1], f"{node.name}/zero_{index}", value.dtype)
    made = new_node("Where", [seen.outputs[0], value, zero.outputs[0]], f"{node.name}/clear_{index}", value.dtype)
    graph.insert_before(node, [seen, zero, made])
    node.replace_input_with(index, made.outputs[0])


def _keep_last(graph: ir.Graph, node: ir.Node, valid: _Valid, layer: int) -> None:
    """Take the state behind each row's last valid token instead of behind the chunk."""
    past, present, x = _past_of(node), node.outputs[1], node.inputs[0]
    width = past.shape[2] if past.shape is not None and len(past.shape) == 3 else None
    if not isinstance(width, int):
        raise RefusalError(layer, f"its state {past.name} has no fixed size")
    kind, steps = ir.DataType.INT64, valid.constant(f"last_{width}", list(range(1, width + 1)))
    joined = new_node("Concat", [past, x], f"{node.name}/joined", past.dtype, None, {"axis": 2})
    place = new_node("Add", [valid.at, steps], f"{node.name}/place", kind)
    shape = new_node("Shape", [past], f"{node.name}/shape", kind)
    places = new_node("Expand", [place.outputs[0], shape.outputs[0]], f"{node.name}/places", kind)
    kept = ir.node("GatherElements", [joined.outputs[0], places.outputs[0]], {"axis": 2}, name=f"{node.name}/kept")
    kept.outputs[0].type, kept.outputs[0].shape = present.type, present.shape
    graph.insert_after(node, [joined, place, shape, places, kept])
    graph.outputs[list(graph.outputs).index(present)] = kept.outputs[0]
    kept.outputs[0].name, present.name = present.name, f"{node.name}/end"


def _name(graph: ir.Graph, layer: int, pairs: dict[str, tuple[ir.Value, ir.Value]]) -> None:
    """Give a layer's states their names; a convolution alone gets a second state, which holds nothing."""
    outputs = {str(value.name): value for value in graph.outputs}
    for (past_name, present_name), kind in zip(state_names(layer).items(), (_CONVOLUTION, _RECURRENCE), strict=True):
        if kind in pairs:
            past = pairs[kind][0]
            present = outputs[re.sub("^past(_key_values)?", "present", str(past.name))]
            past.name, present.name = past_name, present_name
            continue
        first = graph.inputs[0].shape
        shape = ir.Shape(["batch_size" if first is None else first[0], 1, 1, 1])
        like = next(iter(pairs.values()))[0]
        empty = ir.Value(name=past_name, shape=shape, type=like.type)
        node = ir.node("Identity", [empty], name=f"{_PREFIX}/layers.{layer}/empty")
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = present_name, like.type, shape
        graph.append(node)
        graph.inputs.append(empty)
        graph.outputs.append(node.outputs[0])
