"""The attention of a layer above an exit layer (`passes`): the original's in a short step, else that of the rows that
continue.

    qkv [B, M, ·] -- GroupQueryAttention -- output, present                    a short step: M is T
    features [B, T - M, F] - MatMul - Add - (norm) - Concat - ScatterND - rotary - keys, values [B, heads, T, ·]
    qkv of M rows ---- own keys, values -----^-----------^                 |
                 `---- queries -- rotary -- scores -- Softmax -------------+--- output       past in front: present

Predicted KV are between the own ones of the first token and of the last rows. In a padded batch a shorter sequence has
its last rows before the end of the step, so they also replace what is predicted there.

Own keys come normed, if the layer norms keys, so predicted ones get a copy of the nodes between product and attention.

The queries of the rows that continue read the past and this step. GroupQueryAttention takes no batch behind a cache,
which the last rows of a padded batch need, and no first token beside the last ones. So products and a Softmax stand
for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import AttentionBlock, find_attention, key_steps
from nbl_export.graph.emitter import LayerMaker, Maker, choose, need
from nbl_export.graph.names import node_name
from nbl_export.methods.predicted_kv.maps import PredictedKV

__all__ = ["ContinuingRows", "ExitedAttention", "stated_keys"]

_MICROSOFT = "com.microsoft"
_INPUTS = 9  # of GroupQueryAttention: queries, keys, values, caches, lengths, rotary tables; others are refused
_TABLES = 7  # the first input of rotary tables
_SINKS = 11  # input of GroupQueryAttention: a score of each head for no key
_KNOWN = ("num_heads", "kv_num_heads", "scale", "softcap", "do_rotary", "rotary_interleaved", "local_window_size",
          "smooth_softmax", "qk_output", "k_quant_type", "v_quant_type", "kv_cache_bit_width")  # fmt: skip


@dataclass(frozen=True)
class ContinuingRows:
    """What layers above an exit layer share; all but the first two are empty in a short step.

    Attributes:
        shared: makes constants of all layers, of the stream's type.
        skip: whether only few rows continue.
        features: what maps read, of the rows that do not continue, [B, T - M, F].
        positions: of all rows, [B, T]; own: of the rows that continue, [B, M].
        places: sequence and row of those that continue, [B, M, 2].
        unseen: what is added to scores, [B, 1, 1, M, P + T].
        past, whole: tokens before the step and behind it, [1] each.
        cells: sequence, the first head and position of each row in a cache, [B, 1, T, 3].
    """

    shared: Maker
    skip: ir.Value
    features: ir.Value
    positions: ir.Value
    own: ir.Value
    places: ir.Value
    unseen: ir.Value
    past: ir.Value
    whole: ir.Value
    cells: ir.Value


class ExitedAttention:
    """The attention of a layer above an exit layer.

    H are heads of keys, G those of queries for each, S keys and P of the past.

    Args:
        attention: the layer's GroupQueryAttention.

    Raises:
        RefusalError: the attention has inputs or settings that are not understood, or keys come otherwise than by a
            product and a norm.
    """

    def __init__(self, layer: int, attention: ir.Node, mixer: PredictedKV, rows: ContinuingRows) -> None:
        _check(layer, attention)
        self._make = LayerMaker(rows.shared.graph, layer, rows.shared.dtype)
        self._layer = layer
        self._attention = attention
        self._mixer = mixer
        self._rows = rows
        self._settings = _settings(attention)
        self._heads = self._settings["kv_num_heads"]
        self._size = len(mixer.weight) // 2 // self._heads
        self._group = self._settings["num_heads"] // self._heads
        self._steps = () if attention.inputs[1] is None else key_steps(layer, attention)

    def put_choice(self) -> None:
        """Put a choice in the place of the node."""
        old = self._attention
        graph = self._make.graph
        every = Maker(graph, node_name(self._layer, "All/"), self._make.dtype)
        made = every.several(3, old.op_type, "Attention", *old.inputs, domain=_MICROSOFT, **self._settings)
        few = ir.Graph((), self._few(), nodes=self._make.nodes, name="Few")
        original = ir.Graph((), made, nodes=every.nodes, name="All")
        choice = choose(self._rows.skip, few, original, node_name(self._layer, "Attention"))
        replace_nodes_and_values(graph, old, [old], [choice], old.outputs, choice.outputs)

    def _few(self) -> list[ir.Value]:
        """Output of the heads for the rows that continue [B, M, Q], and the caches behind the step."""
        make = self._make
        mixer = self._mixer
        rows = self._rows
        queries, own = (need(value, "queries, keys and values") for value in self._projected())
        made = make.add(make.matmul(rows.features, mixer.weight, "weight"), mixer.bias, "bias")
        parts = self._integers("rows", [1, mixer.recent_tokens])
        if self._steps:
            keys, values = make.several(2, "Split", "Predicted", made, axis=2, num_outputs=2)
            made = make("Concat", "Normed", self._normed(keys), values, axis=2)
        first, recent_tokens = make.several(2, "Split", "FirstNear", own, parts, axis=1)
        made = make("Concat", "Rows", first, made, recent_tokens, axis=1)
        made = make("ScatterND", "Own", made, rows.places, own)
        made = make("Reshape", "Heads", made, self._integers("heads", [0, 0, 2 * self._heads, self._size]))
        made = make("Transpose", "HeadMajor", made, perm=[0, 2, 1, 3])
        keys, values = make.several(2, "Split", "KeysValues", made, axis=1, num_outputs=2)
        keys = self._rotated("Keys", keys, rows.positions, self._heads)
        used = [self._used("Key", 3, keys), self._used("Value", 4, values)]
        return [self._attend(queries, *used), *self._caches([keys, values], used)]

    def _projected(self) -> Sequence[ir.Value | None]:
        """Queries [B, M, Q], and keys beside values [B, M, 2 K], of the rows that continue."""
        queries, keys, values = self._attention.inputs[:3]
        if keys is not None:
            return queries, self._make("Concat", "OwnKeysValues", keys, values, axis=2)
        widths = self._integers("widths", [self._group * self._heads * self._size, len(self._mixer.weight)])
        return self._make.several(2, "Split", "Queries", queries, widths, axis=2)

    def _normed(self, keys: ir.Value) -> ir.Value:
        """What the steps between a layer's product and its attention make of predicted keys."""
        for n, step in enumerate(self._steps):
            kind = step.outputs[0].dtype or self._make.dtype
            given = {"domain": step.domain, "dtype": kind, **_settings(step)}
            keys = self._make(step.op_type, f"Step{n}", keys, *step.inputs[1:], **given)
        return keys

    def _rotated(self, name: str, x: ir.Value, positions: ir.Value, heads: int) -> ir.Value:
        if not self._settings.get("do_rotary", 0):
            return x
        cosine, sine = self._attention.inputs[7:9]
        half = None if cosine is None or cosine.shape is None else cosine.shape[-1]
        part = {"rotary_embedding_dim": 2 * half} if isinstance(half, int) and 2 * half < self._size else {}
        attributes = {"num_heads": heads, "interleaved": self._settings.get("rotary_interleaved", 0), **part}
        given = (x, positions, cosine, sine)
        return self._make("RotaryEmbedding", f"{name}Rotary", *given, domain=_MICROSOFT, **attributes)

    def _used(self, name: str, past: int, new: ir.Value) -> ir.Value:
        """Keys or values up to this step's last, [B, H, P + T, ·].

        Args:
            past: input of the attention that is the cache.
        """
        make = self._make
        axis = self._integers("length", [2])
        begin = self._integers("begin", [0])
        before = make("Slice", f"{name}Before", self._attention.inputs[past], begin, self._rows.past, axis)
        return make("Concat", f"{name}Used", before, new, axis=2)

    def _caches(self, new: Sequence[ir.Value], used: Sequence[ir.Value]) -> Sequence[ir.Value]:
        """The caches of keys and values behind the step.

        Caches with room for the step get its new rows alone. Where past and present are one buffer, ONNX Runtime's
        ScatterND copies no other row. Caches without room grow to the used part.
        """
        make = self._make
        shared = self._rows.shared
        keys, values = self._attention.inputs[3:5]
        size = make("Shape", "CacheLength", keys, dtype=ir.DataType.INT64, start=2, end=3)
        room = make("GreaterOrEqual", "Room", size, self._rows.whole, dtype=ir.DataType.BOOL)
        room = make("Squeeze", "HasRoom", room, dtype=ir.DataType.BOOL)
        in_place, grown = (Maker(make.graph, node_name(self._layer, f"{title}/"), make.dtype)
                           for title in ("InPlace", "Grown"))  # fmt: skip
        every_head = [[[[0, head, 0]] for head in range(self._heads)]]
        heads = shared.constant("cache_heads", every_head, ir.DataType.INT64)
        cells = in_place("Add", "Cells", self._rows.cells, heads, dtype=ir.DataType.INT64)
        written = [in_place("ScatterND", f"{name}Present", cache, cells, rows)
                   for name, cache, rows in zip(("Key", "Value"), (keys, values), new, strict=True)]  # fmt: skip
        same = [grown("Identity", f"{name}Present", rows) for name, rows in zip(("Key", "Value"), used, strict=True)]
        branches = (
            ir.Graph((), written, nodes=in_place.nodes, name="InPlace"),
            ir.Graph((), same, nodes=grown.nodes, name="Grown"),
        )
        choice = choose(room, *branches, node_name(self._layer, "Caches"))
        make.nodes.append(choice)
        return choice.outputs

    def _attend(self, queries: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        make = self._make
        number = self._rows.shared.constant
        heads = self._heads
        group = self._group
        size = self._size
        scale = self._settings.get("scale", 0.0) or size**-0.5
        q = self._rotated("Queries", queries, self._rows.own, heads * group)
        q = make("Mul", "Scaled", q, number("scale", scale))
        q = make("Reshape", "QueryHeads", q, self._integers("query_heads", [0, 0, heads, group, size]))
        q = make("Transpose", "QueriesBHGMd", q, perm=[0, 2, 3, 1, 4])
        axis = self._integers("length", [2])
        k = make("Transpose", "KeysBH1dS", make("Unsqueeze", "KeysBH1Sd", keys, axis), perm=[0, 1, 2, 4, 3])
        scores = make("MatMul", "Scores", q, k)
        if cap := self._settings.get("softcap", 0.0):
            scores = make("Tanh", "Soft", make("Div", "Capped", scores, number("cap", cap)))
            scores = make("Mul", "Uncapped", scores, number("cap", cap))
        scores = make("Add", "Masked", scores, self._unseen())
        sinks = self._attention.inputs[_SINKS] if len(self._attention.inputs) > _SINKS else None
        if sinks is not None:
            column = make("ReduceMax", "Column", scores, self._integers("last", [-1]))
            column = make("Mul", "NoScore", column, number("nothing", 0.0))
            heads_of = make("Reshape", "Sinks", sinks, self._integers("sinks", [1, heads, group, 1, 1]))
            scores = make("Concat", "WithSinks", scores, make("Add", "SinkScores", column, heads_of), axis=-1)
        weights = make("Softmax", "Softmax", scores, axis=-1)
        if sinks is not None:
            begin = self._integers("begin", [0])
            weights = make(
                "Slice", "OfKeys", weights, begin, self._integers("last", [-1]), self._integers("last", [-1])
            )
        found = make("MatMul", "Weighted", weights, make("Unsqueeze", "ValuesBH1Sd", values, axis))
        found = make("Transpose", "OutputBMHGd", found, perm=[0, 3, 1, 2, 4])
        return make("Reshape", "Output", found, self._integers("output", [0, 0, heads * group * size]))

    def _unseen(self) -> ir.Value:
        """What scores get: that of all layers, and the lowest number for keys before the window."""
        make = self._make
        window = self._settings.get("local_window_size", -1)
        if window < 0:
            return self._rows.unseen
        ints = Maker(make.graph, node_name(self._layer, "Window/"), ir.DataType.INT64)
        number = self._rows.shared.constant
        shape = ints("Shape", "unseen", self._rows.unseen, start=4, end=5)
        nothing, one = (number(f"int_{n}", n, ir.DataType.INT64) for n in (0, 1))
        keys = ints("Range", "keys", nothing, ints("Squeeze", "count", shape), one)
        last = ints("Sub", "before", self._rows.own, number(f"window_{window}", window, ir.DataType.INT64))
        last = ints("Unsqueeze", "before_BM1", last, self._integers("last", [-1]))
        seen = ints("Greater", "seen", keys, last, dtype=ir.DataType.BOOL)
        make.nodes.extend(ints.nodes)
        assert make.dtype is not None
        lowest = np.finfo(make.dtype.numpy()).min
        seen = make("Unsqueeze", "Seen", seen, self._integers("outer", [1, 2]), dtype=ir.DataType.BOOL)
        return make("Where", "InWindow", seen, self._rows.unseen, number("unseen", lowest))

    def _integers(self, name: str, numbers: Sequence[int]) -> ir.Value:
        return self._rows.shared.constant(name, numbers, ir.DataType.INT64)


def stated_keys(block: AttentionBlock) -> int | None:
    """Numbers of a token's keys, from the cache's shape, or that of the queries; None if none states them."""
    dims = block.pasts[0].shape
    if dims is not None and isinstance(dims[1], int) and isinstance(dims[3], int):
        return dims[1] * dims[3]
    attention = find_attention(block)
    settings = _settings(attention)
    queries, keys = attention.inputs[:2]
    width = None if queries is None or queries.shape is None else queries.shape[-1]
    heads = settings["num_heads"] + (2 * settings["kv_num_heads"] if keys is None else 0)  # beside queries or apart
    return width * settings["kv_num_heads"] // heads if isinstance(width, int) else None


def _settings(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _check(layer: int, attention: ir.Node) -> None:
    found = _settings(attention)
    surplus = [
        v.name for place, v in enumerate(attention.inputs) if v is not None and place >= _INPUTS and place != _SINKS
    ]
    unknown = [
        name for name in found if name not in _KNOWN or (name not in _KNOWN[:7] and found[name] not in (0, "NONE"))
    ]
    if surplus or unknown or len(attention.outputs) != 3:
        what = next(iter([*surplus, *unknown]), "further outputs")
        raise RefusalError(layer, f"its attention has {what}, and a prompt cannot stop below it")
    needed = attention.inputs[3 : _INPUTS if found.get("do_rotary", 0) else _TABLES]
    if any(v is None for v in needed) or len(attention.inputs) < _TABLES:
        raise RefusalError(layer, "its attention has no cache, lengths or rotary tables, which an exit layer needs")
