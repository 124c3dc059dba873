"""Of a long step, only the first and the last W tokens continue above an exit layer (`methods.predicted_kv.maps`).

    before   x [B, T, D] ------------------------ layer c -- ... -- logits [B, T, V]
    after    x -- If(skip) -- rows [B, M, D] ---- layer c -- ... -- logits [B, M, V]
                   `--------- features, positions ---^ of each layer (`attention`)

`skip`: each sequence of the step has more than W + 1 valid new tokens. M is W + 1 then, else T, and all is as before.
So a decode step runs a few small nodes more, and an `If` around each attention above the exit layer. Matrices are
outside of these choices, so each is stored once. If a skip norm makes x, its two inputs are taken instead of x, and
it stays.

The features are the normed rows 1 .. T - W - 1, and beside each, with `before`, the normed row of the token before it.
The static form has no such choices (`static`).

Refuses attention above the exit layer without a map, and states there: their rows would be others than those that
continue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import find_attention, find_block, graph_caches
from nbl_export.graph.caches import is_static
from nbl_export.graph.emitter import Maker, choose, dependent_nodes, element_type, graph_input
from nbl_export.graph.names import EXIT_ROWS
from nbl_export.graph.passes.skip_norms import SKIP_NORMS, SUM, bias_of
from nbl_export.graph.passes.tail import LastValid
from nbl_export.methods.predicted_kv.attention import ContinuingRows, ExitedAttention, stated_keys
from nbl_export.methods.predicted_kv.maps import PredictedKV, exit_of, require_keys
from nbl_export.methods.predicted_kv.static import exit_static, name_rows

__all__ = ["PrefillExit"]

_PREFIX = "/nbl/exit"
_CONSTANTS = "nbl.exit"
_INT = ir.DataType.INT64
_BOOL = ir.DataType.BOOL


class PrefillExit(ir.passes.InPlacePass):
    """Put an exit layer into the graph, at the lowest layer with predicted KV.

    Args:
        maps: of all layers from the exit layer up.
    """

    def __init__(self, maps: Mapping[int, PredictedKV]) -> None:
        super().__init__()
        self.maps = dict(sorted(maps.items()))

    def requires(self, model: ir.Model) -> None:
        """One exit layer, and above it maps for all attention."""
        first = exit_of(self.maps)
        exit_layer = first.exit_layer
        for layer, mixer in self.maps.items():
            if (mixer.inputs, mixer.epsilon) != (first.inputs, first.epsilon):
                raise RefusalError(layer, "its predicted KV have another norm or another input")
            if layer < exit_layer:
                raise RefusalError(layer, f"it predicts KV below the exit layer at layer {exit_layer}")
        caches = graph_caches(model.graph)
        if above := [i for i in caches if i >= exit_layer and i not in self.maps]:
            what = "it has attention without predicted KV, and stands above the exit layer of the prompt at layer"
            raise RefusalError(min(above), f"{what} {exit_layer}")
        if exit_layer not in caches:
            raise RefusalError(exit_layer, "it has no attention, so a prompt cannot stop below it")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        mixer = exit_of(self.maps)
        blocks = {layer: find_block(graph, layer) for layer in self.maps}
        for layer, block in blocks.items():
            require_keys(layer, self.maps[layer], stated_keys(block))
        stream = find_block(graph, mixer.exit_layer).residual
        if is_static(graph):
            exit_static(graph, stream, blocks, self.maps)
            return ir.passes.PassResult(model, modified=True)
        attentions = {layer: find_attention(block) for layer, block in blocks.items()}
        continuing = _exit(graph, stream, mixer, element_type(graph, blocks[mixer.exit_layer].pasts[0]))
        for layer, own in self.maps.items():
            ExitedAttention(layer, attentions[layer], own, continuing).put_choice()
        return ir.passes.PassResult(model, modified=True)


def _exit(graph: ir.Graph, x: ir.Value, mixer: PredictedKV, attended: ir.DataType) -> ContinuingRows:
    """Take the rows that continue of x, the stream at the exit layer.

    Args:
        attended: type of attention and its caches; the stream of a graph in fp16 may be wider.
    """
    ints = Maker(graph, f"{_PREFIX}/", _INT, f"{_CONSTANTS}.")
    last = LastValid(graph, f"{_PREFIX}/chunk", f"{_CONSTANTS}.chunk")
    if last.chunk is None:
        raise RefusalError(None, "it has no attention_mask, from which the rows that continue are known")
    count = ints("ReduceSum", "count", last.chunk, ints.constant("row", [1]), keepdims=0)
    least = ints("ReduceMin", "least", count, keepdims=0)
    skip = ints("Greater", "skip", least, ints.constant("most", mixer.recent_tokens + 1), dtype=_BOOL)
    graph.insert_before(graph[0], [*last.index, *ints.nodes])
    dtype = element_type(graph, x)
    producer = x.producer()
    joined = producer if producer is not None and producer.op_type in SKIP_NORMS and x.index() == SUM else None
    terms = [x] if joined is None else [value for value in joined.inputs[:2] if value is not None]
    bias = None if joined is None else bias_of(joined)
    uses = [(use, value) for value in terms for use in value.uses() if joined is None or use.node is joined]
    step = _Step(ints, Maker(graph, f"{_PREFIX}/Few/", _INT), last.chunk, last.at, terms, bias, mixer, dtype, attended)
    choice = choose(skip, *step.branches(), EXIT_ROWS)
    rows = dict(zip(terms, choice.outputs[1:], strict=False))
    for (node, index), value in uses:
        node.replace_input_with(index, rows[value])
    makers = {skip.producer(), *(value.producer() for value in terms)}
    next(node for node in reversed(graph) if node in makers).append(choice)
    ids = graph_input(graph, "input_ids")
    for node in dependent_nodes(graph, rows.values()):
        for value in node.outputs:
            name_rows(value, ids)
    shared = Maker(graph, "", attended, f"{_CONSTANTS}.layers.")
    return ContinuingRows(shared, skip, *choice.outputs[1 + len(terms) :])


@dataclass(frozen=True)
class _Step:
    """Makes the two branches at the exit layer: what all layers above it share.

    Attributes:
        ints: makes constants. make: makes nodes of the branch of few rows.
        chunk: mask of this step [B, T].
        at: index of the last valid token [B, 1, 1].
        terms, bias: the stream is their sum.
        dtype: of the stream. attended: of attention.
    """

    ints: Maker
    make: Maker
    chunk: ir.Value
    at: ir.Value
    terms: Sequence[ir.Value]
    bias: ir.Value | None
    mixer: PredictedKV
    dtype: ir.DataType
    attended: ir.DataType

    def branches(self) -> tuple[ir.Graph, ir.Graph]:
        """Few rows, and all rows. Outputs: index of the last row, the rows of terms, fields of `ContinuingRows`."""
        every = Maker(self.make.graph, f"{_PREFIX}/All/", _INT)
        outputs = self._few()
        same = [every("Identity", "last", self.at)]
        same += [every("Identity", f"rows_{n}", value, dtype=self.dtype) for n, value in enumerate(self.terms)]
        for n, value in enumerate(outputs[len(same) :]):
            kind = value.dtype or _INT
            same.append(every("Constant", f"none_{n}", dtype=kind, value=ir.tensor(np.zeros(0, kind.numpy()))))
        few = ir.Graph((), outputs, nodes=self.make.nodes, name="Few")
        return few, ir.Graph((), same, nodes=every.nodes, name="All")

    def _few(self) -> list[ir.Value]:
        make = self.make
        number = self.ints.constant
        recent_tokens = self.mixer.recent_tokens
        end = make("Squeeze", "end", self.at, number("last", [-1]))
        zero = make("Sub", "zero", end, end)
        recent_rows = make("Add", "recent_rows", end, number("recent", np.arange(1 - recent_tokens, 1)[None]))
        rows = make("Concat", "rows", zero, recent_rows, axis=1)
        places = make("Unsqueeze", "places", rows, number("last", [-1]))
        length = make("Shape", "length", self.chunk, start=1, end=2)
        whole = make("Shape", "whole", graph_input(make.graph, "attention_mask"), start=1, end=2)
        past = make("Sub", "past", whole, length)
        tokens = make("Range", "tokens", number("first", 0), make("Squeeze", "count", length), number("step", 1))
        positions = make("Add", "positions", make("Add", "tokens_BT", zero, tokens), past)
        own = make("Add", "own_positions", rows, past)
        sequences = make("Shape", "sequences", self.chunk, start=0, end=1)
        batch = make("Range", "batch", number("first", 0), make("Squeeze", "size", sequences), number("step", 1))
        batch = make("Unsqueeze", "batch_B11", batch, number("outer", [1, 2]))
        cells = self._cells(batch, positions)
        batch = make("Add", "batch_BM1", batch, make("Sub", "nothing", places, places))
        scatter = make("Concat", "scatter", batch, places, axis=2)
        of_stream = {"dtype": self.dtype, "batch_dims": 1}
        taken = [make("GatherND", f"rows_{n}", value, places, **of_stream) for n, value in enumerate(self.terms)]
        last = make("Add", "last_row", make("Sub", "none", self.at, self.at), number("few", recent_tokens))
        return [last, *taken, self._features(), positions, own, scatter, self._unseen(own, whole), past, whole, cells]

    def _cells(self, batch: ir.Value, positions: ir.Value) -> ir.Value:
        """Where all rows stand in the first head of a cache [B, 1, T, 3]."""
        make = self.make
        number = self.ints.constant
        places = make("Unsqueeze", "cache_rows", positions, number("cache_axes", [1, 3]))
        of_batch = make("Unsqueeze", "cache_batch", batch, number("row", [1]))
        of_batch = make("Mul", "cache_sequences", of_batch, number("sequence", [1, 0, 0]))
        return make("Add", "cells", of_batch, make("Mul", "cache_places", places, number("place", [0, 0, 1])))

    def _unseen(self, own: ir.Value, whole: ir.Value) -> ir.Value:
        """What scores get [B, 1, 1, M, P + T]: zero, or the lowest number for keys behind the query."""
        make = self.make
        number = self.ints.constant
        dtype = self.attended
        keys = make("Range", "keys", number("first", 0), make("Squeeze", "all_keys", whole), number("step", 1))
        seen = make("LessOrEqual", "seen", keys, make("Unsqueeze", "queries", own, number("last", [-1])), dtype=_BOOL)
        lowest = number("unseen", np.finfo(dtype.numpy()).min, dtype)
        added = make("Where", "added", seen, number("seen", 0, dtype), lowest, dtype=dtype)
        return make("Unsqueeze", "added_B11MS", added, number("outer", [1, 2]), dtype=dtype)

    def _features(self) -> ir.Value:
        make = self.make
        number = self.ints.constant
        dtype = self.dtype
        mixer = self.mixer
        x, *others = self.terms if self.bias is None else (*self.terms, self.bias)
        for n, other in enumerate(others):
            x = make("Add", f"sum_{n}", x, other, dtype=dtype)
        ones = number("norm", np.ones(mixer.inputs), dtype)
        norm = {"axis": -1, "stash_type": 1, "epsilon": mixer.epsilon}
        normed = make("SimplifiedLayerNormalization", "norm", x, ones, dtype=dtype, **norm)
        axis = number("row", [1])
        behind = number("recent_begins", [-mixer.recent_tokens])
        skipped = make("Slice", "skipped", normed, axis, behind, axis, dtype=dtype)
        until = number("before_ends", [-mixer.recent_tokens - 1])
        before = make("Slice", "before", normed, number("begin", [0]), until, axis, dtype=dtype)
        features = make("Concat", "features", skipped, before, dtype=dtype, axis=2)
        if dtype == self.attended:
            return features
        return make("Cast", "attended", features, dtype=self.attended, to=self.attended)
