"""Rows that a step needs at the windows above the last full attention, which are few (`rewrite.tail` uses them).

    tokens of a step     t0  t1  t2 ...................................................... last
    enter window 0       t0                       | 2 (W - 1) + 1 rows ................... last     of two windows
    enter window 1       t0                                              | W rows ........ last
    leave window 1                                                                         last

`mixers.rows` counts the rows. A window also reads the mark of the row before these. Its state behind the step is the
last W of them. The first token of a text passes through all windows, since all read it. It stands in front of the
others as a row of its own, which also marks that rows are left out. Later steps have no first row: the states hold it,
and their last row is the mark. If a step has no more tokens than rows are needed, all pass, in order behind the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from nbl_export.graph.anatomy import Join, find_reader, reading_layers
from nbl_export.graph.caches import graph_states
from nbl_export.graph.emitter import Maker, choose, new_node
from nbl_export.graph.names import node_name
from nbl_export.mixers.rows import Read, Rows, rows_of_top
from nbl_export.rewrite.integers import Integers
from nbl_export.rewrite.window import SHARED, window_tokens

__all__ = ["Stage", "stages_of", "top_windows"]


def top_windows(graph: ir.Graph) -> tuple[int, ...]:
    """Windows above the last layer that reads far, ascending."""
    found: list[int] = []
    for layer in reversed(reading_layers(graph)):
        prefix = node_name(layer, "Window")
        if layer not in graph_states(graph) or not any(str(node.name).startswith(prefix) for node in graph):
            break
        found.append(layer)
    return tuple(reversed(found))


@dataclass(frozen=True)
class Stage:
    """A stream of fewer rows: those that enter a window, or the last row alone.

    Attributes:
        join: of the layer below, in front of which the rows are taken.
        at: indices [B, R, 1] of the rows, among those of the stage below.
        window: the layer that reads the rows; None for the last row.
        instead: what this window reads of these rows, by the value of all rows of a step.
    """

    join: Join
    at: ir.Value
    window: int | None = None
    instead: Mapping[ir.Value, ir.Value] = field(default_factory=dict)

    def take(self, value: ir.Value, name: str) -> ir.Node:
        """A node that takes the rows of a value; it is not in the graph yet."""
        title = f"/nbl/tail/{name}" if self.window is None else f"/nbl/tail/layers.{self.window}/{name}"
        return new_node("GatherND", [value, self.at], title, value.dtype, None, {"batch_dims": 1})

    def give(self, graph: ir.Graph) -> None:
        """Let the window know these rows instead of all rows of a step."""
        if self.window is None:
            return
        prefix = node_name(self.window, "")
        for node in graph.all_nodes():
            for index, value in enumerate(node.inputs if str(node.name).startswith(prefix) else ()):
                if value is not None and value in self.instead:
                    node.replace_input_with(index, self.instead[value])


def stages_of(graph: ir.Graph, windows: tuple[int, ...]) -> tuple[list[Stage], ir.Node, ir.Node]:
    """The stages from the layer below the windows up, a node that finds their rows, and the node in front of it.

    If each sequence has one new token, this is the only row of every stage, and nothing is computed.
    """
    readers, nodes = reading_layers(graph), {str(node.name): node for node in graph}
    joins = [find_reader(graph, layer) for layer in (readers[readers.index(windows[0]) - 1], *windows)]
    behind = nodes[f"{SHARED[0]}/single"]
    mask, last = (nodes[f"{SHARED[1]}/{name}"].outputs[0] for name in ("mask", "index"))
    one, more = Maker("/nbl/tail/One/", ir.DataType.INT64), Integers(graph, "/nbl/tail/windows", "nbl.tail.windows")
    below, found, same = _Rows.all_of(graph, more, mask, last), [], []
    read = (Read(rows=Rows.WINDOW, tokens=window_tokens(graph)),)
    for layer, need in rows_of_top(dict.fromkeys(windows, read)).items():
        below, at = below.fewer(need.last or 1, f"layers.{layer}/")
        found += [at, below.last, below.mask]
        every = {"at": last, "last": last, "mask": mask}
        same += [one("Identity", f"layers.{layer}/{part}", value) for part, value in every.items()]
    branches = (ir.Graph((), same, nodes=one.nodes, name="One"), ir.Graph((), found, nodes=more.nodes, name="More"))
    choice = choose(behind.outputs[0], *branches, "/nbl/tail/Rows")
    rows = [choice.outputs[3 * n : 3 * n + 3] for n in range(len(windows))]
    stages = [
        Stage(join, at, layer, {last: its_last, mask: its_mask})
        for join, layer, (at, its_last, its_mask) in zip(joins, windows, rows, strict=False)
    ]
    return [*stages, Stage(joins[-1], rows[-1][1])], choice, behind


@dataclass(frozen=True)
class _Rows:
    """Rows that reach a layer: [the first token |] tokens from `start` on, up to the last one; integers of a graph.

    Attributes:
        chunk, final, first: mask [B, T], and index of the last and the first token [B, 1, 1], among all tokens T.
        start: index of the row behind the extra one [B, 1, 1], among all tokens.
        extra: [1], 1 if the first token is a row of its own; `apart` [B, 1, 1] says whether the sequence needs it.
        mask, last: as of all tokens, among these rows.
    """

    emit: Integers
    past: ir.Value  # [1]: 1 if there were tokens before this step
    chunk: ir.Value
    final: ir.Value
    first: ir.Value
    start: ir.Value
    extra: ir.Value
    apart: ir.Value
    mask: ir.Value
    last: ir.Value

    @classmethod
    def all_of(cls, graph: ir.Graph, emit: Integers, mask_BT: ir.Value, last_B11: ir.Value) -> _Rows:
        """All tokens of a step."""
        every = next(v for v in graph.inputs if v.name == "attention_mask")
        count = emit("Shape", "all", mask_BT, start=1, end=2)
        before = emit("Sub", "before", emit("Shape", "length_of_all", every, start=1, end=2), count)
        past = emit("Min", "past", before, emit.constant("one", [1]))
        left = emit("Range", "left", emit("Squeeze", "all_tokens", count), *_bounds(emit))
        most = emit(
            "ReduceMax", "most", emit("Mul", "valid_left", mask_BT, left), emit.constant("last", [-1]), keepdims=1
        )
        first = emit("Mod", "first", emit("Sub", "behind", count, most), count)
        first = emit("Unsqueeze", "first_index", first, emit.constant("last", [-1]))
        none = emit.constant("none_of_all", [0])
        zero = emit.constant("zero_of_all", [[[0]]])
        return cls(emit, past, mask_BT, last_B11, first, zero, none, zero, mask_BT, last_B11)

    def fewer(self, most: int, name: str) -> tuple[_Rows, ir.Value]:
        """The last `most` rows and the first token, and their indices [B, R, 1] among these rows."""
        node, one = _named(self.emit, name), self.emit.constant("one", [1])
        none, zero = self.emit.constant("none_of_all", [0]), self.emit.constant("zero", 0)
        axis, step = self.emit.constant("rows_axis", [1]), self.emit.constant("step", 1)
        count = node("Shape", "count", self.chunk, start=1, end=2)
        rows = node("Min", "kept", count, self.emit.constant(f"{name}most", [most]))
        lacking = node("Min", "lacking", node("Sub", "left_out", count, rows), one)
        extra = node("Mul", "extra", lacking, node("Sub", "is_first", one, self.past))
        end = node("Add", "end", self.final, one)
        start = node("Max", "start", node("Sub", "begin", end, rows), none)
        places = node("Range", "places", zero, node("Squeeze", "rows_kept", rows), step)
        chosen = node("Add", "chosen", start, node("Unsqueeze", "column", places, self.emit.constant("last", [-1])))
        away = node("Sub", "away", start, self.first)
        apart = node("Max", "apart", node("Min", "at_most_one", away, one), none)
        own = node(
            "Slice", "own", node("Squeeze", "apart_row", apart, self.emit.constant("last", [-1])), none, extra, axis
        )
        mask = node("GatherND", "mask_of_rows", self.chunk, chosen, batch_dims=1)
        mask = node("Concat", "mask", own, mask, axis=1)
        shift = node("Sub", "shift", self.extra, self.start)
        here = node("Add", "here", self.first, shift)
        here = node("Mul", "first_here", here, node("Sub", "beside", one, self.apart))
        at = node(
            "Concat",
            "at",
            node("Slice", "first_row", here, none, extra, axis),
            node("Add", "at_rows", chosen, shift),
            axis=1,
        )
        last = node("Add", "last", node("Sub", "last_of_rows", self.final, start), extra)
        found = _Rows(self.emit, self.past, self.chunk, self.final, self.first, start, extra, apart, mask, last)
        return found, at


def _bounds(emit: Integers) -> tuple[ir.Value, ir.Value]:
    return emit.constant("zero", 0), emit.constant("back", -1)


def _named(emit: Integers, begin: str) -> Callable[..., ir.Value]:
    return lambda op, name, *inputs, **attributes: emit(op, f"{begin}{name}", *inputs, **attributes)
