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
from nbl_export.graph.emitter import Maker, choose, element_type, graph_input, values_read
from nbl_export.graph.names import EXIT_ROWS
from nbl_export.graph.passes.skip_norms import SKIP_NORMS, SUM, bias_of
from nbl_export.graph.passes.tail import LastValid
from nbl_export.methods.base import Mixer
from nbl_export.methods.predicted_kv.attention import ContinuingRows, exit_attention
from nbl_export.methods.predicted_kv.maps import PredictedKV
from nbl_export.methods.predicted_kv.prompt_exit import prompt_exit_of
from nbl_export.methods.predicted_kv.static import exit_static, name_rows

__all__ = ["PrefillExit"]

_PREFIX = "/nbl/cut"
_CONSTANTS = "nbl.cut"
_INT = ir.DataType.INT64
_BOOL = ir.DataType.BOOL


class PrefillExit(ir.passes.InPlacePass):
    """Put an exit layer into the graph, at the lowest layer with predicted KV; run before the other mixers are put in.

    Args:
        mixers: of all layers.
    """

    def __init__(self, mixers: Mapping[int, Mixer]) -> None:
        super().__init__()
        self.mixers = mixers

    def requires(self, model: ir.Model) -> None:
        """One exit layer, and above it maps for all attention."""
        prompt_exit = prompt_exit_of(self.mixers)
        if prompt_exit is None:
            return
        first = next(iter(prompt_exit.maps.values()))
        for layer, mixer in prompt_exit.maps.items():
            if _numbers(mixer) != _numbers(first):
                raise RefusalError(layer, "its predicted KV have another norm or another input")
            if layer < prompt_exit.layer:
                raise RefusalError(layer, f"it predicts KV below the exit layer at layer {prompt_exit.layer}")
        caches = graph_caches(model.graph)
        if above := [i for i in caches if i >= prompt_exit.layer and i not in self.mixers]:
            what = "it has attention without predicted KV, and stands above the exit layer of the prompt at layer"
            raise RefusalError(min(above), f"{what} {prompt_exit.layer}")
        if prompt_exit.layer not in caches:
            raise RefusalError(prompt_exit.layer, "it has no attention, so a prompt cannot stop below it")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        prompt_exit = prompt_exit_of(self.mixers)
        if prompt_exit is None:
            return ir.passes.PassResult(model, modified=False)
        blocks = {layer: find_block(graph, layer) for layer in prompt_exit.maps}
        if is_static(graph):
            exit_static(graph, find_block(graph, prompt_exit.layer).residual, blocks, prompt_exit.maps)
            return ir.passes.PassResult(model, modified=True)
        attentions = {layer: find_attention(block) for layer, block in blocks.items()}
        continuing = _exit(graph, find_block(graph, prompt_exit.layer).residual, next(iter(prompt_exit.maps.values())))
        shared = Maker("", continuing.dtype, graph, "nbl.cut.layers")
        for layer, mixer in prompt_exit.maps.items():
            exit_attention(graph, layer, attentions[layer], blocks[layer], mixer, continuing, shared)
        return ir.passes.PassResult(model, modified=True)


def _numbers(mixer: PredictedKV) -> tuple[int, float]:
    return mixer.inputs, mixer.epsilon


def _exit(graph: ir.Graph, x: ir.Value, mixer: PredictedKV) -> ContinuingRows:
    """Take the rows that continue of x, the stream at the exit layer."""
    ints = Maker(f"{_PREFIX}/", _INT, graph, _CONSTANTS)
    last = LastValid(graph, f"{_PREFIX}/chunk", f"{_CONSTANTS}.chunk")
    if last.chunk is None:
        raise RefusalError(None, "it has no attention_mask, from which the rows that continue are known")
    count = ints("ReduceSum", "count", last.chunk, ints.constant("row", [1]), keepdims=0)
    least = ints("ReduceMin", "least", count, keepdims=0)
    skip = ints("Greater", "skip", least, ints.constant("most", mixer.recent_tokens + 1), kind=_BOOL)
    graph.insert_before(graph[0], [*last.index, *ints.nodes])
    maker = x.producer()
    dtype = element_type(graph, x)
    joined = maker is not None and maker.op_type in SKIP_NORMS and x.index() == SUM
    terms = [value for value in (maker.inputs[:2] if maker is not None and joined else [x]) if value is not None]
    bias = bias_of(maker) if maker is not None and joined else None
    uses = [(node, i) for value in terms for node, i in value.uses() if node is maker or not joined]
    step = _Step(graph, ints, last.chunk, last.at, dtype)
    choice = choose(skip, *step.branches(terms, bias, mixer), EXIT_ROWS)
    rows = dict(zip(terms, choice.outputs[1:], strict=False))
    for node, i in uses:
        value = node.inputs[i]
        assert value is not None
        node.replace_input_with(i, rows[value])
    _insert_behind(graph, terms, choice)
    _rename_rows(graph, list(rows.values()))
    return ContinuingRows(skip, dtype, *choice.outputs[1 + len(terms) :])


def _insert_behind(graph: ir.Graph, values: Sequence[ir.Value], node: ir.Node) -> None:
    """Insert a node behind all makers of its values."""
    makers = {value.producer() for value in values}
    last = next(other for other in reversed(graph) if other in makers or str(other.name) == f"{_PREFIX}/skip")
    graph.insert_after(last, [node])


def _rename_rows(graph: ir.Graph, rows: Sequence[ir.Value]) -> None:
    """Give values above the exit layer another symbol for their number of rows."""
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
    """Makes the two branches at the exit layer: what all layers above it share.

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

    def branches(
        self, terms: Sequence[ir.Value], bias: ir.Value | None, mixer: PredictedKV
    ) -> tuple[ir.Graph, ir.Graph]:
        """Few rows, and all rows. Outputs: index of the last row, the rows of terms, fields of `ContinuingRows`."""
        few = Maker(f"{_PREFIX}/Few/", _INT)
        every = Maker(f"{_PREFIX}/All/", _INT)
        outputs = self._few(few, terms, bias, mixer)
        same = [every("Identity", "last", self.at)]
        same += [every("Identity", f"rows_{n}", value, kind=self.dtype) for n, value in enumerate(terms)]
        for n, value in enumerate(outputs[len(same) :]):
            kind = value.dtype or _INT
            same.append(every("Constant", f"none_{n}", kind=kind, value=ir.tensor(np.zeros(0, kind.numpy()))))
        return ir.Graph((), outputs, nodes=few.nodes, name="Few"), ir.Graph((), same, nodes=every.nodes, name="All")

    def _few(self, make: Maker, terms: Sequence[ir.Value], bias: ir.Value | None, mixer: PredictedKV) -> list[ir.Value]:
        number = self.ints.constant
        dtype = self.dtype
        recent_tokens = mixer.recent_tokens
        end = make("Squeeze", "end", self.at, number("last", [-1]))
        zero = make("Sub", "zero", end, end)
        near_rows = make("Add", "near_rows", end, number("near", np.arange(1 - recent_tokens, 1)[None]))
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
        last = make("Add", "last_row", make("Sub", "none", self.at, self.at), number("few", recent_tokens))
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

    def _features(self, make: Maker, terms: Sequence[ir.Value], mixer: PredictedKV) -> ir.Value:
        number = self.ints.constant
        dtype = self.dtype
        x, *others = terms
        for n, other in enumerate(others):
            x = make("Add", f"sum_{n}", x, other, kind=dtype)
        ones = number("norm", np.ones(mixer.inputs), dtype)
        kind = "SimplifiedLayerNormalization"
        normed: ir.Value = make(kind, "norm", x, ones, kind=dtype, axis=-1, stash_type=1, epsilon=mixer.epsilon)
        axis = number("row", [1])
        behind = number("near_begins", [-mixer.recent_tokens])
        skipped: ir.Value = make("Slice", "far", normed, axis, behind, axis, kind=dtype)
        until = number("before_ends", [-mixer.recent_tokens - 1])
        before = make("Slice", "before", normed, number("begin", [0]), until, axis, kind=dtype)
        features: ir.Value = make("Concat", "features", skipped, before, kind=dtype, axis=2)
        return features
