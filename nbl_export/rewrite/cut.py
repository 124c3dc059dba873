"""Of a long step, only the first row and the last W rows climb above a cut (`mixers.predicted`).

    before   x [B, T, D] ------------------------ layer c -- ... -- logits [B, T, V]
    after    x -- If(skip) -- rows [B, M, D] ---- layer c -- ... -- logits [B, M, V]
                   `--------- features, positions ---^ of each layer (`cut_attention`)

`skip`: each sequence of the step has more than W + 1 valid new tokens. M is W + 1 then, else T, and all is as before.
So a decode step runs a few small nodes more, and an `If` around each attention above the cut. Matrices are outside of
these choices, so each is stored once. If a skip norm makes x, its two inputs are taken instead of x, and it stays.

The features are the normed rows 1 .. T - W - 1, and beside each, with `before`, the normed row of the token before it.
The static form has no such choices (`cut_static`).

Refuses attention above the cut without a map, and states there: their rows would be others than those that climb.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import find_attention, find_block, graph_caches
from nbl_export.graph.caches import is_static
from nbl_export.graph.emitter import Maker, choose, element_type, graph_input, values_read
from nbl_export.graph.names import CUT_ROWS
from nbl_export.mixers.base import Mixer
from nbl_export.mixers.cut import cut_of
from nbl_export.mixers.predicted import Predicted
from nbl_export.rewrite.blocks import SKIP_NORMS, SUM, bias_of
from nbl_export.rewrite.cut_attention import Climb, cut_attention
from nbl_export.rewrite.cut_static import cut_static, name_rows
from nbl_export.rewrite.tail import LastValid

__all__ = ["CutPrompt"]

_PREFIX = "/nbl/cut"
_CONSTANTS = "nbl.cut"
_INT = ir.DataType.INT64
_BOOL = ir.DataType.BOOL


class CutPrompt(ir.passes.InPlacePass):
    """Cut the graph below the lowest layer of a plan's predicted keys; run before the other mixers are put in.

    Args:
        mixers: of all layers.
    """

    def __init__(self, mixers: Mapping[int, Mixer]) -> None:
        super().__init__()
        self.mixers = mixers

    def requires(self, model: ir.Model) -> None:
        """One cut, and above it maps for all attention."""
        cut = cut_of(self.mixers)
        if cut is None:
            return
        first = next(iter(cut.maps.values()))
        for layer, mixer in cut.maps.items():
            if _numbers(mixer) != _numbers(first):
                raise RefusalError(layer, "its predicted keys have another norm or another input")
            if layer < cut.layer:
                raise RefusalError(layer, f"it predicts keys below the cut at layer {cut.layer}")
        caches = graph_caches(model.graph)
        if above := [i for i in caches if i >= cut.layer and i not in self.mixers]:
            what = "it has attention without predicted keys, and stands above the cut of the prompt at layer"
            raise RefusalError(min(above), f"{what} {cut.layer}")
        if cut.layer not in caches:
            raise RefusalError(cut.layer, "it has no attention, so a prompt cannot be cut below it")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        cut = cut_of(self.mixers)
        if cut is None:
            return ir.passes.PassResult(model, modified=False)
        blocks = {layer: find_block(graph, layer) for layer in cut.maps}
        if is_static(graph):
            cut_static(graph, find_block(graph, cut.layer).residual, blocks, cut.maps)
            return ir.passes.PassResult(model, modified=True)
        attentions = {layer: find_attention(block) for layer, block in blocks.items()}
        climb = _cut(graph, find_block(graph, cut.layer).residual, next(iter(cut.maps.values())))
        shared = Maker("", climb.dtype, graph, "nbl.cut.layers")
        for layer, mixer in cut.maps.items():
            cut_attention(graph, layer, attentions[layer], blocks[layer], mixer, climb, shared)
        return ir.passes.PassResult(model, modified=True)


def _numbers(mixer: Predicted) -> tuple[int, float]:
    return mixer.inputs, mixer.epsilon


def _cut(graph: ir.Graph, x: ir.Value, mixer: Predicted) -> Climb:
    """Take the rows that climb of x, the stream at the cut."""
    ints = Maker(f"{_PREFIX}/", _INT, graph, _CONSTANTS)
    last = LastValid(graph, f"{_PREFIX}/chunk", f"{_CONSTANTS}.chunk")
    if last.chunk is None:
        raise RefusalError(None, "it has no attention_mask, from which the rows that climb are known")
    count = ints("ReduceSum", "count", last.chunk, ints.constant("row", [1]), keepdims=0)
    least = ints("ReduceMin", "least", count, keepdims=0)
    skip = ints("Greater", "skip", least, ints.constant("most", mixer.near + 1), kind=_BOOL)
    graph.insert_before(graph[0], [*last.index, *ints.nodes])
    maker = x.producer()
    dtype = element_type(graph, x)
    joined = maker is not None and maker.op_type in SKIP_NORMS and x.index() == SUM
    terms = [value for value in (maker.inputs[:2] if maker is not None and joined else [x]) if value is not None]
    bias = bias_of(maker) if maker is not None and joined else None
    uses = [(node, i) for value in terms for node, i in value.uses() if node is maker or not joined]
    step = _Step(graph, ints, last.chunk, last.at, dtype)
    choice = choose(skip, *step.branches(terms, bias, mixer), CUT_ROWS)
    rows = dict(zip(terms, choice.outputs[1:], strict=False))
    for node, i in uses:
        value = node.inputs[i]
        assert value is not None
        node.replace_input_with(i, rows[value])
    _insert_behind(graph, terms, choice)
    _rename_rows(graph, list(rows.values()))
    return Climb(skip, dtype, *choice.outputs[1 + len(terms) :])


def _insert_behind(graph: ir.Graph, values: Sequence[ir.Value], node: ir.Node) -> None:
    """Insert a node behind all makers of its values."""
    makers = {value.producer() for value in values}
    last = next(other for other in reversed(graph) if other in makers or str(other.name) == f"{_PREFIX}/skip")
    graph.insert_after(last, [node])


def _rename_rows(graph: ir.Graph, rows: Sequence[ir.Value]) -> None:
    """Give values above the cut another symbol for their number of rows."""
    shape = graph_input(graph, "input_ids").shape
    tokens = None if shape is None else shape[1]
    reached = set(rows)
    for node in graph:
        if not any(value in reached for value in values_read(node)):
            continue
        for value in node.outputs:
            reached.add(value)
            name_rows(value, tokens)


@dataclass(frozen=True)
class _Step:
    """Makes the two branches at the cut: what all layers above it share.

    Attributes:
        chunk: mask of this step [B, T].
        at: index of the last valid token [B, 1, 1].
        dtype: of the stream.
    """

    graph: ir.Graph
    ints: Maker
    chunk: ir.Value
    at: ir.Value
    dtype: ir.DataType

    def branches(self, terms: Sequence[ir.Value], bias: ir.Value | None, mixer: Predicted) -> tuple[ir.Graph, ir.Graph]:
        """Few rows, and all rows. Outputs: the last row's index, the terms' rows, and the fields of a `Climb`."""
        few = Maker(f"{_PREFIX}/Few/", _INT)
        every = Maker(f"{_PREFIX}/All/", _INT)
        outputs = self._few(few, terms, bias, mixer)
        same = [every("Identity", "last", self.at)]
        same += [every("Identity", f"rows_{n}", value, kind=self.dtype) for n, value in enumerate(terms)]
        for n, value in enumerate(outputs[len(same) :]):
            kind = value.dtype or _INT
            same.append(every("Constant", f"none_{n}", kind=kind, value=ir.tensor(np.zeros(0, kind.numpy()))))
        return ir.Graph((), outputs, nodes=few.nodes, name="Few"), ir.Graph((), same, nodes=every.nodes, name="All")

    def _few(self, make: Maker, terms: Sequence[ir.Value], bias: ir.Value | None, mixer: Predicted) -> list[ir.Value]:
        number = self.ints.constant
        dtype = self.dtype
        near = mixer.near
        end = make("Squeeze", "end", self.at, number("last", [-1]))
        zero = make("Sub", "zero", end, end)
        near_rows = make("Add", "near_rows", end, number("near", np.arange(1 - near, 1)[None]))
        rows = make("Concat", "rows", zero, near_rows, axis=1)
        places = make("Unsqueeze", "places", rows, number("last", [-1]))
        length = make("Shape", "length", self.chunk, start=1, end=2)
        whole = make("Shape", "whole", graph_input(self.graph, "attention_mask"), start=1, end=2)
        past = make("Sub", "past", whole, length)
        tokens = make("Range", "tokens", number("first", 0), make("Squeeze", "count", length), number("step", 1))
        positions = make("Add", "positions", make("Add", "tokens_BT", zero, tokens), past)
        own = make("Add", "own_positions", rows, past)
        sequences = make("Shape", "sequences", self.chunk, start=0, end=1)
        batch = make("Range", "batch", number("first", 0), make("Squeeze", "size", sequences), number("step", 1))
        batch = make("Unsqueeze", "batch_B11", batch, number("outer", [1, 2]))
        batch = make("Add", "batch_BM1", batch, make("Sub", "nothing", places, places))
        scatter = make("Concat", "scatter", batch, places, axis=2)
        taken = [
            make("GatherND", f"rows_{n}", value, places, kind=dtype, batch_dims=1) for n, value in enumerate(terms)
        ]
        last = make("Add", "last_row", make("Sub", "none", self.at, self.at), number("few", near))
        features = self._features(make, [*terms, *([] if bias is None else [bias])], mixer)
        return [last, *taken, features, positions, own, scatter, self._unseen(make, own, whole), past, whole]

    def _unseen(self, make: Maker, own: ir.Value, whole: ir.Value) -> ir.Value:
        """What scores get [B, 1, 1, M, P + T]: zero, or the lowest number for keys behind the query."""
        number = self.ints.constant
        keys = make("Range", "keys", number("first", 0), make("Squeeze", "all_keys", whole), number("step", 1))
        seen = make("LessOrEqual", "seen", keys, make("Unsqueeze", "queries", own, number("last", [-1])), kind=_BOOL)
        lowest = number("unseen", np.finfo(self.dtype.numpy()).min, self.dtype)
        zero = number("seen", 0, self.dtype)
        added = make("Where", "added", seen, zero, lowest, kind=self.dtype)
        return make("Unsqueeze", "added_B11MS", added, number("outer", [1, 2]), kind=self.dtype)

    def _features(self, make: Maker, terms: Sequence[ir.Value], mixer: Predicted) -> ir.Value:
        number = self.ints.constant
        dtype = self.dtype
        x, *others = terms
        for n, other in enumerate(others):
            x = make("Add", f"sum_{n}", x, other, kind=dtype)
        ones = number("norm", np.ones(mixer.inputs), dtype)
        kind = "SimplifiedLayerNormalization"
        normed: ir.Value = make(kind, "norm", x, ones, kind=dtype, axis=-1, stash_type=1, epsilon=mixer.epsilon)
        axis = number("row", [1])
        behind = number("near_begins", [-mixer.near])
        far: ir.Value = make("Slice", "far", normed, axis, behind, axis, kind=dtype)
        until = number("before_ends", [-mixer.near - 1])
        before = make("Slice", "before", normed, number("begin", [0]), until, axis, kind=dtype)
        features: ir.Value = make("Concat", "features", far, before, kind=dtype, axis=2)
        return features
