"""The exit layer of the static form (`passes`): few rows of a long step continue, by arithmetic of shapes and without a
choice.

    x [B, T, D] -- GatherND(places) -- rows [B, M, D] ---- layer c -- ... -- logits [B, M, V]
      `-- norm -- Slice -- skipped rows [B, T - M, F] -- map --+-- Concat -- GatherND(source) -- rotary -- TensorScatter
                            own keys and values [B, M, K] -`

M is min(T, W + 1), a number that a builder knows for each profile. A step of at most W + 1 tokens has M = T and no
skipped row, so it is the original's. Each sequence continues with its own first token and its own last W valid ones. A
sequence of at most W + 1 tokens continues whole, beside longer ones too. Rows of padding hold anything, and the next
step replaces them.

Rotary tables and masks of the rows that continue are computed anew, from the positions of these rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import AttentionBlock, Written, find_written
from nbl_export.graph.emitter import LayerMaker, Maker, dependent_nodes, element_type, graph_input
from nbl_export.graph.names import EXIT_ROWS
from nbl_export.graph.passes.tail import LastValid
from nbl_export.methods.predicted_kv.maps import PredictedKV

__all__ = ["exit_static", "name_rows"]

_PREFIX = "/nbl/exit"
_CONSTANTS = "nbl.exit"
_INT = ir.DataType.INT64
_BOOL = ir.DataType.BOOL


def exit_static(
    graph: ir.Graph, x: ir.Value, blocks: Mapping[int, AttentionBlock], maps: Mapping[int, PredictedKV]
) -> None:
    """Put the exit layer into the graph, at the stream x.

    Args:
        blocks: of all layers with maps.

    Raises:
        RefusalError: keys are not rotated by positions, or do not reach a cache as the static form writes them.
    """
    mixer = next(iter(maps.values()))
    dtype = element_type(graph, x)
    written = {layer: find_written(block) for layer, block in blocks.items()}
    positions = _positions(*next(iter(written.items())))
    ints = Maker(graph, f"{_PREFIX}/", _INT, f"{_CONSTANTS}.")
    make = Maker(graph, f"{_PREFIX}/", dtype, f"{_CONSTANTS}.")
    step = _Step.of(ints, mixer.recent_tokens)
    readers = tuple(x.uses())
    rows = make("GatherND", "continuing_rows", x, step.places, batch_dims=1)
    for node, index in readers:
        node.replace_input_with(index, rows)
    own = ints("GatherND", "own_positions", positions, step.places, batch_dims=1)
    again = _recompute(graph, rows, {positions: own}, {found.rotary for found in written.values()})
    features = _features(ints, make, step, x, mixer)
    graph.extend([*again, *make.nodes, *ints.nodes])
    for layer, found in written.items():
        of_layer = LayerMaker(graph, layer, dtype)
        both = _predicted(ints, of_layer, maps[layer], features)
        for name, skipped, node in (("Keys", both[0], found.rotary), ("Values", both[1], found.values)):
            beside = of_layer("Concat", f"{name}Beside", node.inputs[0], skipped, axis=1)
            node.replace_input_with(0, of_layer("GatherND", f"{name}InPlace", beside, step.source, batch_dims=1))
        graph.extend(of_layer.nodes)
    graph.sort()


def name_rows(value: ir.Value, ids: ir.Value) -> None:
    """Give a value of the rows that continue another symbol for their number than that of all tokens, [B, T]."""
    dims = value.shape
    tokens = None if ids.shape is None else ids.shape[1]
    if dims is not None and len(dims) == 3 and dims[1] == tokens:
        value.shape = ir.Shape([dims[0], "continuing_length", dims[2]])


@dataclass(frozen=True)
class _Step:
    """Which rows of a step continue.

    Attributes:
        places: row of each that continues, [B, M, 1].
        source: for each row of the step, its place among those that continue and the skipped ones behind them, [B,
        T, 1]. end: index behind the last skipped row, T - M + 1, [1].
    """

    places: ir.Value
    source: ir.Value
    end: ir.Value

    @classmethod
    def of(cls, ints: Maker, recent_tokens: int) -> _Step:
        last = LastValid(ints.graph, f"{_PREFIX}/chunk", f"{_CONSTANTS}.chunk")
        ints.graph.extend(last.index)
        zero = ints.constant("zero", 0)
        one = ints.constant("one", 1)
        column = ints.constant("column", [1])
        none = ints.constant("none", [0])

        def counted(name: str, count: ir.Value) -> ir.Value:
            """0, 1, ... below a count [1], as a column."""
            found = ints("Range", f"{name}_rows", zero, ints("Squeeze", f"{name}_count", count, none), one)
            return ints("Unsqueeze", f"{name}_column", found, column)

        length = ints("Shape", "length", graph_input(ints.graph, "input_ids"), start=1, end=2)
        few = ints("Min", "few", length, ints.constant("most", [recent_tokens + 1]))  # M
        steps_T1 = counted("all", length)
        continuing_M1 = counted("few", few)
        last_place = ints("Sub", "last_place", few, one)
        last_row = ints("Min", EXIT_ROWS.removeprefix(f"{_PREFIX}/"), last.at, last_place)
        stop = ints("Sub", "stop", last.at, last_row)  # [B, 1, 1]: rows that stop
        shifted = ints("Mul", "shifted", ints("Min", "is_behind_first", continuing_M1, one), stop)
        places = ints("Add", "places", continuing_M1, shifted)
        recent_place = ints("Max", "recent_place", ints("Sub", "from_recent", steps_T1, stop), zero)
        recent_place = ints("Min", "own_place", recent_place, last_place)
        behind_first = ints("Greater", "is_not_first", steps_T1, zero, dtype=_BOOL)
        is_skipped = ints("LessOrEqual", "is_before_recent", steps_T1, stop, dtype=_BOOL)
        is_skipped = ints("And", "is_skipped", behind_first, is_skipped, dtype=_BOOL)
        source = ints("Where", "source", is_skipped, ints("Add", "skipped_place", steps_T1, last_place), recent_place)
        return cls(places, source, ints("Sub", "skipped_end", length, last_place))


def _positions(layer: int, found: Written) -> ir.Value:
    """Positions [B, T] that the tables of a rotary embedding are read at."""
    tables = found.rotary.inputs[1:2]
    gather = tables[0].producer() if tables and tables[0] is not None else None
    positions = gather.inputs[1] if gather is not None and gather.op_type == "Gather" else None
    if positions is None:
        raise RefusalError(layer, "its rotary tables are not read at positions, which an exit layer needs")
    return positions


def _recompute(
    graph: ir.Graph, rows: ir.Value, moved: dict[ir.Value, ir.Value], whole: Collection[ir.Node]
) -> Sequence[ir.Node]:
    """Let layers above the exit layer read masks and rotary tables of the rows that continue; returns new nodes.

    Args:
        moved: positions of a step -> those of the rows that continue.
        whole: nodes that will compute all rows.
    """
    make = Maker(graph, f"{_PREFIX}/own/", output="")
    ids = graph_input(graph, "input_ids")
    nodes = list(dependent_nodes(graph, [rows]))
    reached = {rows}.union(*(node.outputs for node in nodes))
    for node in nodes:
        if node in whole:
            continue
        for value in node.outputs:
            name_rows(value, ids)
        for index, given in enumerate(node.inputs):
            if given is not None and given not in reached:
                node.replace_input_with(index, _moved(make, given, moved))
    return make.nodes


def _moved(make: Maker, value: ir.Value, moved: dict[ir.Value, ir.Value]) -> ir.Value:
    """The value computed anew from moved positions; the value itself if it does not depend on positions."""
    node = value.producer()
    if value in moved or node is None:
        return moved.get(value, value)
    inputs = [None if given is None else _moved(make, given, moved) for given in node.inputs]
    moved[value] = value
    if inputs != list(node.inputs):
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        moved[value] = make(node.op_type, str(node.name), *inputs, dtype=value.dtype, **attributes)
    return moved[value]


def _features(ints: Maker, make: Maker, step: _Step, x: ir.Value, mixer: PredictedKV) -> ir.Value:
    """What maps read, of the skipped rows [B, T - M, F]; of unpadded sequences, and more than these of padded ones."""
    ones = make.constant("norm", np.ones(mixer.inputs))
    normed = make("RMSNormalization", "norm", x, ones, axis=-1, epsilon=mixer.epsilon)
    axis = ints.constant("row", [1])
    one = ints.constant("begin", [1])
    skipped = make("Slice", "skipped", normed, one, step.end, axis)
    end = ints("Sub", "before_end", step.end, one)
    before = make("Slice", "before", normed, ints.constant("none", [0]), end, axis)
    return make("Concat", "features", skipped, before, axis=2)


def _predicted(ints: Maker, make: LayerMaker, mixer: PredictedKV, features: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Keys before rotary embedding, and values, of the skipped rows."""
    made = make.add(make.matmul(features, mixer.weight, "weight"), mixer.bias, "bias")
    axis = ints.constant("width_axis", [2])
    width = len(mixer.bias) // 2
    start, middle, end = (ints.constant(f"width_{n}", [n]) for n in (0, width, 2 * width))
    keys = make("Slice", "SkippedKeys", made, start, middle, axis)
    values = make("Slice", "SkippedValues", made, middle, end, axis)
    return keys, values
