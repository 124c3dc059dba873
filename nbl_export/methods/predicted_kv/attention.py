"""The attention of a layer above an exit layer (`passes`): the original's in a short step, else that of the rows that
continue.

    qkv [B, M, ·] -- GroupQueryAttention -- output, present                    a short step: M is T
    features [B, T - M, F] - MatMul - Add - Concat - ScatterND - rotary - keys, values [B, heads, T, ·]
    qkv of M rows ---- own keys, values -----^-----------^                 |
                 `---- queries -- rotary -- scores -- Softmax -------------+--- output       past in front: present

Predicted KV are between the own ones of the first token and of the last rows. In a padded batch a shorter sequence has
its last rows before the end of the step, so they also replace what is predicted there.

The queries of the rows that continue read the past and this step. GroupQueryAttention takes no batch behind a cache,
which the last rows of a padded batch need, and no first token beside the last ones. So products and a Softmax stand
for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import AttentionBlock
from nbl_export.graph.emitter import Maker, add_initializer, choose
from nbl_export.graph.names import constant_name, node_name, product_name
from nbl_export.methods.predicted_kv.maps import PredictedKV

__all__ = ["ContinuingRows", "exit_attention"]

_MICROSOFT = "com.microsoft"
_INPUTS = 9  # of GroupQueryAttention: queries, keys, values, caches, lengths, rotary tables; others are refused
_KNOWN = ("num_heads", "kv_num_heads", "scale", "softcap", "do_rotary", "rotary_interleaved", "local_window_size",
          "smooth_softmax", "qk_output", "k_quant_type", "v_quant_type", "kv_cache_bit_width")  # fmt: skip


@dataclass(frozen=True)
class ContinuingRows:
    """What layers above an exit layer share; all but the first two are empty in a short step.

    Attributes:
        skip: whether only few rows continue.
        dtype: of the stream.
        features: what maps read, of the rows that do not continue, [B, T - M, F].
        positions: of all rows, [B, T]; own: of the rows that continue, [B, M].
        places: sequence and row of those that continue, [B, M, 2].
        unseen: what is added to scores, [B, 1, 1, M, P + T].
        past, whole: tokens before the step and behind it, [1] each.
    """

    skip: ir.Value
    dtype: ir.DataType
    features: ir.Value
    positions: ir.Value
    own: ir.Value
    places: ir.Value
    unseen: ir.Value
    past: ir.Value
    whole: ir.Value


def exit_attention(
    graph: ir.Graph,
    layer: int,
    attention: ir.Node,
    block: AttentionBlock,
    mixer: PredictedKV,
    continuing: ContinuingRows,
    shared: Maker,
) -> None:
    """Put a choice in the place of a layer's GroupQueryAttention.

    Args:
        shared: makes constants of all layers.

    Raises:
        RefusalError: the attention has a window, sinks, or inputs that are not understood.
    """
    _check(layer, attention)
    few = _Few(graph, layer, attention, block, mixer, continuing, shared)
    every = Maker(node_name(layer, "All/"), continuing.dtype)
    made = every(
        attention.op_type, "Attention", *attention.inputs, outputs=3, domain=_MICROSOFT, **_attributes(attention)
    )
    choice = choose(
        continuing.skip,
        ir.Graph((), few.outputs(), nodes=few.nodes, name="Few"),
        ir.Graph((), made, nodes=every.nodes, name="All"),
        node_name(layer, "Attention"),
    )
    graph.insert_before(attention, [choice])
    for old, new in zip(attention.outputs, choice.outputs, strict=True):
        new.shape = old.shape
        new.type = old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    names = [output.name for output in attention.outputs]
    graph.remove(attention, safe=True)
    for new, name in zip(choice.outputs, names, strict=True):
        new.name = name


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _check(layer: int, attention: ir.Node) -> None:
    found = _attributes(attention)
    if found.get("local_window_size", -1) > 0:
        raise RefusalError(layer, "its attention has a sliding window, and a prompt cannot stop below it")
    surplus = [v.name for v in attention.inputs[_INPUTS:] if v is not None]
    unknown = [
        name for name in found if name not in _KNOWN or (name not in _KNOWN[:7] and found[name] not in (0, "NONE"))
    ]
    if surplus or unknown or len(attention.outputs) != 3:
        what = next(iter([*surplus, *unknown]), "further outputs")
        raise RefusalError(layer, f"its attention has {what}, and a prompt cannot stop below it")
    if any(v is None for v in attention.inputs[3:_INPUTS]) or len(attention.inputs) < _INPUTS:
        raise RefusalError(layer, "its attention has no cache, lengths or rotary tables, which an exit layer needs")


class _Few:
    """The branch of the rows that continue. H are heads of keys, G those of queries for each, S keys and P of the
    past."""

    def __init__(
        self,
        graph: ir.Graph,
        layer: int,
        attention: ir.Node,
        block: AttentionBlock,
        mixer: PredictedKV,
        continuing: ContinuingRows,
        shared: Maker,
    ) -> None:
        self._make = Maker(node_name(layer, ""), continuing.dtype)
        self._graph = graph
        self._layer = layer
        self._mixer = mixer
        self._exit_prefill = continuing
        self._float = shared.constant
        self._given = attention.inputs
        self._settings = _attributes(attention)
        self._pasts = block.pasts
        self._heads = self._settings["kv_num_heads"]
        self._size = len(mixer.weight) // 2 // self._heads
        self._group = self._settings["num_heads"] // self._heads
        self.nodes = self._make.nodes

    def outputs(self) -> list[ir.Value]:
        """Output of the heads [B, M, Q], and the caches behind the step."""
        make = self._make
        continuing = self._exit_prefill
        queries, own = self._projected()
        title = product_name(self._layer, "weight").rpartition("/")[2]
        made = make("MatMul", title, continuing.features, self._map("weight", self._mixer.weight.T))
        made = make("Add", "Add", made, self._map("bias", self._mixer.bias))
        first, recent_tokens = make(
            "Split", "FirstNear", own, self._integers("rows", [1, self._mixer.recent_tokens]), outputs=2, axis=1
        )
        made = make("Concat", "Rows", first, made, recent_tokens, axis=1)
        made = make("ScatterND", "Own", made, continuing.places, own)
        made = make("Reshape", "Heads", made, self._integers("heads", [0, 0, 2 * self._heads, self._size]))
        made = make("Transpose", "HeadMajor", made, perm=[0, 2, 1, 3])
        keys, values = make("Split", "KeysValues", made, outputs=2, axis=1, num_outputs=2)
        keys = self._rotated("Keys", keys, continuing.positions, self._heads)
        behind = [self._behind(*pair) for pair in zip(("Key", "Value"), self._pasts, (keys, values), strict=True)]
        return [self._attend(queries, behind[0][0], behind[1][0]), behind[0][1], behind[1][1]]

    def _projected(self) -> tuple[ir.Value, ir.Value]:
        """Queries [B, M, Q], and keys beside values [B, M, 2 K], of the rows that continue."""
        queries, keys, values = self._given[:3]
        assert queries is not None
        if keys is not None:
            return queries, self._make("Concat", "OwnKeysValues", keys, values, axis=2)
        widths = [self._group * self._heads * self._size, len(self._mixer.weight)]
        parts = self._make("Split", "Queries", queries, self._integers("widths", widths), outputs=2, axis=2)
        return parts[0], parts[1]

    def _rotated(self, name: str, x: ir.Value, positions: ir.Value, heads: int) -> ir.Value:
        cosine, sine = self._given[7:9]
        half = None if cosine is None or cosine.shape is None else cosine.shape[-1]
        part = {"rotary_embedding_dim": 2 * half} if isinstance(half, int) and 2 * half < self._size else {}
        attributes = {"num_heads": heads, "interleaved": self._settings.get("rotary_interleaved", 0), **part}
        rotated: ir.Value = self._make(
            "RotaryEmbedding", f"{name}Rotary", x, positions, cosine, sine, domain=_MICROSOFT, **attributes
        )
        return rotated

    def _behind(self, name: str, past: ir.Value, new: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Keys or values up to this step's last, [B, H, P + T, ·], and the cache, which may be longer."""
        make = self._make
        axis = self._integers("length", [2])
        before = make("Slice", f"{name}Before", past, self._integers("begin", [0]), self._exit_prefill.past, axis)
        used = make("Concat", f"{name}Used", before, new, axis=2)
        end = self._integers("end", [np.iinfo(np.int64).max])
        rest = make("Slice", f"{name}Rest", past, self._exit_prefill.whole, end, axis)
        return used, make("Concat", f"{name}Present", used, rest, axis=2)

    def _attend(self, queries: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        make = self._make
        heads = self._heads
        group = self._group
        size = self._size
        scale = self._settings.get("scale", 0.0) or size**-0.5
        q = self._rotated("Queries", queries, self._exit_prefill.own, heads * group)
        q = make("Mul", "Scaled", q, self._float("scale", scale))
        q = make("Reshape", "QueryHeads", q, self._integers("query_heads", [0, 0, heads, group, size]))
        q = make("Transpose", "QueriesBHGMd", q, perm=[0, 2, 3, 1, 4])
        axis = self._integers("length", [2])
        k = make("Transpose", "KeysBH1dS", make("Unsqueeze", "KeysBH1Sd", keys, axis), perm=[0, 1, 2, 4, 3])
        scores = make("MatMul", "Scores", q, k)
        if cap := self._settings.get("softcap", 0.0):
            scores = make("Tanh", "Soft", make("Div", "Capped", scores, self._float("cap", cap)))
            scores = make("Mul", "Uncapped", scores, self._float("cap", cap))
        weights = make("Softmax", "Softmax", make("Add", "Masked", scores, self._exit_prefill.unseen), axis=-1)
        found = make("MatMul", "Weighted", weights, make("Unsqueeze", "ValuesBH1Sd", values, axis))
        found = make("Transpose", "OutputBMHGd", found, perm=[0, 3, 1, 2, 4])
        output: ir.Value = make("Reshape", "Output", found, self._integers("output", [0, 0, heads * group * size]))
        return output

    def _map(self, name: str, array: np.ndarray) -> ir.Value:
        name = constant_name(self._layer, name)
        return add_initializer(self._graph, name, np.ascontiguousarray(array), self._exit_prefill.dtype)

    def _integers(self, name: str, numbers: list[int]) -> ir.Value:
        return self._float(name, numbers, ir.DataType.INT64)
