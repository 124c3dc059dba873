"""Only the first and the last W tokens of each run of positions continue above an exit layer, in an IR.

    before   x [B, T, D] ------------------------------- layer c -- ... -- norm -- head -> logits [B, T, V]
    after    x -- flat -- Gather(continuing) [M, 1, D] -- layer c -- ... -- norm -- spread -- head -> logits [B, T, V]

    a layer  queries   own rows [M, 1, Q], zeros for skipped tokens      --+
             keys      own rows [M, 1, K], predicted for skipped tokens  --+-- [B, T, .] -- rotary, states, attention
             values    as keys                                           --+                       |
                                          o_proj -- Gather(continuing) [M, 1, Q] -- flat [B T, 1, Q]

The tokens of all sequences are one list. A run is a part of this list whose positions count up by one, and ends with
a row of the batch. The paged back end of OpenVINO GenAI has each token as a row of the batch, of one column: [tokens,
1, D]. There, a step holds prompts, parts of prompts and single tokens of several sequences, and positions alone tell
them apart. A run of at most W + 1 tokens continues as a whole, so a single token does.

Attention reads all queries, since the paged back end replaces attention of this form alone. Maps multiply skipped
tokens only, so a step without such tokens reads no map. Logits of skipped tokens are NaN.

The paged back end may put two sequences side by side of which the second begins at the position behind the end of the
first. They are one run. The first one's end continues if the second one has fewer than W tokens, or the first one has
one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nbl_export.errors import RefusalError
from nbl_export.graph.ir.anatomy import Dataflow, Heads
from nbl_export.graph.names import constant_name, product_name
from nbl_export.methods.predicted_kv.maps import PredictedKV, exit_of, require_keys

__all__ = ["exit_ir"]

_PREFIX = "/nbl/exit"


def exit_ir(model: Any, maps: Mapping[int, PredictedKV]) -> None:
    """Put an exit layer into an IR, in place, at the lowest layer with predicted KV.

    Raises:
        RefusalError: a layer is not understood, or has attention from the exit layer up and no map.
    """
    flow = Dataflow(model)
    mixer = exit_of(maps)
    above = [layer for layer in flow.states if layer >= mixer.exit_layer]
    if missing := sorted(set(above) ^ set(maps)):
        raise RefusalError(missing[0], f"maps are for layers {sorted(maps)}, and layers {above} have attention")
    blocks = {layer: flow.block(layer) for layer in above}
    heads = {layer: flow.heads(blocks[layer]) for layer in above}
    for layer, found in heads.items():
        require_keys(layer, maps[layer], _width(found.keys.get_source_output()))
    head = flow.head()
    stream = blocks[mixer.exit_layer].residual
    readers = stream.get_target_inputs()
    shapes = flow.shapes_of(stream, mixer.exit_layer)
    step = _Step(model, stream, mixer)
    for reader in readers:
        reader.replace_source_output(step.stream)
    for reader in shapes:
        reader.replace_source_output(stream)
    for layer, block in blocks.items():
        product, data = block.last
        product.input(data).replace_source_output(step.joined(heads[layer]))
        step.fill(layer, heads[layer], maps[layer])
    hidden = head.input_value(0)
    head.input(0).replace_source_output(step.spread(hidden, np.nan, "logits"))
    model.validate_nodes_and_infer_types()


class _Step:
    """Which tokens of a step continue, and how rows of both kinds stand side by side again.

    Attributes:
        stream: rows of the stream at the exit layer that continue [M, 1, D].
    """

    def __init__(self, model: Any, stream: Any, mixer: PredictedKV) -> None:
        from openvino import opset13

        self._ops = opset13
        ops = opset13
        self._shape = ops.gather(ops.shape_of(stream, "i64"), _ints([0, 1]), _ints(0))
        positions = ops.reshape(model.input("position_ids"), _ints([-1]), False)
        count = ops.shape_of(positions, "i64")
        tokens = ops.range(_ints(0), ops.squeeze(count, _ints([0])), _ints(1), "i64")
        continues = self._choice(positions, tokens, mixer.recent_tokens)
        self._continuing = self._where(continues, "continuing")
        self._skipped = self._where(ops.logical_not(continues), "skipped")
        order = ops.concat([self._continuing, self._skipped], 0)
        self._places = ops.scatter_update(tokens, order, tokens, _ints(0))
        self._count = ops.shape_of(self._continuing, "i64")
        flat = self.flat(stream, mixer.inputs)
        self.stream = self.continuing(flat)
        self._inputs = self._read(flat, mixer.epsilon)

    def _choice(self, positions: Any, tokens: Any, recent_tokens: int) -> Any:
        """Whether each token of the list continues."""
        ops = self._ops
        following = ops.add(positions, _ints(1))
        after = ops.concat([self._part(positions, 1, _END), self._part(positions, -1, _END)], 0)
        before = ops.concat([self._part(following, 0, 1), self._part(following, 0, -1)], 0)
        columns = ops.gather(self._shape, _ints(1), _ints(0))
        column = ops.floor_mod(tokens, columns)
        has_columns = ops.greater(columns, _ints(1))
        opens = ops.logical_and(has_columns, ops.equal(column, _ints(0)))
        closes = ops.logical_and(has_columns, ops.equal(ops.add(column, _ints(1)), columns))
        begins = ops.logical_or(opens, ops.not_equal(positions, before))
        ends = ops.convert(ops.logical_or(closes, ops.not_equal(after, following)), "f32")
        window = [recent_tokens]
        seen = ops.max_pool(ops.unsqueeze(ends, _ints([0, 1])), [1], [1], [0], [recent_tokens - 1], window)
        recent = ops.greater(ops.reshape(seen.output(0), _ints([-1]), False), ops.constant(np.float32(0)))
        return ops.logical_or(recent, begins)

    def _part(self, value: Any, start: int, stop: int) -> Any:
        return self._ops.slice(value, _ints([start]), _ints([stop]), _ints([1]))

    def _where(self, chosen: Any, name: str) -> Any:
        """Numbers of the tokens of one kind."""
        ops = self._ops
        return ops.reshape(ops.non_zero(chosen, "i64"), _ints([-1]), False, name=f"{_PREFIX}/{name}")

    def _taken(self, flat: Any, tokens: Any) -> Any:
        return self._ops.gather(flat, tokens, _ints(0))

    def continuing(self, flat: Any) -> Any:
        """Rows that continue, of [B T, 1, N]."""
        return self._taken(flat, self._continuing).output(0)

    def flat(self, value: Any, width: int) -> Any:
        """[B, T, N], or [B, T, heads, head size], as [B T, 1, N]."""
        return self._ops.reshape(value, _ints([-1, 1, width]), False)

    def joined(self, heads: Heads) -> Any:
        """Rows of attention that continue [M, 1, Q]."""
        rows = self._ops.transpose(heads.attention, _ints([0, 2, 1, 3]))
        return self.continuing(self.flat(rows, _width(heads.queries.get_source_output())))

    def _read(self, flat: Any, epsilon: float) -> Any:
        """What maps read of skipped tokens [S, 1, 2 D]; a skipped token is never the first one (`maps.rows_read`)."""
        ops = self._ops
        mean = ops.reduce_mean(ops.multiply(flat, flat), _ints([-1]), True)
        normed = ops.divide(flat, ops.sqrt(ops.add(mean, ops.constant(np.float32(epsilon)))))
        before = ops.subtract(self._skipped, _ints(1))
        return ops.concat([self._taken(normed, self._skipped), self._taken(normed, before)], 2)

    def fill(self, layer: int, heads: Heads, mixer: PredictedKV) -> None:
        """Give the heads of a layer their rows of skipped tokens."""
        ops = self._ops
        weight = ops.constant(np.ascontiguousarray(mixer.weight, np.float32), name=constant_name(layer, "weight"))
        bias = ops.constant(mixer.bias.astype(np.float32)[None, None], name=constant_name(layer, "bias"))
        product = ops.matmul(self._inputs, weight, False, True, name=product_name(layer, "weight"))
        predicted = ops.split(ops.add(product, bias), _ints(2), 2).outputs()
        for port, others in zip((heads.keys, heads.values), predicted, strict=True):
            rows = ops.concat([port.get_source_output(), others], 0)
            port.replace_source_output(self._laid(self._taken(rows, self._places)))
        heads.queries.replace_source_output(self.spread(heads.queries.get_source_output(), 0, f"{layer}"))

    def spread(self, own: Any, other: float, name: str) -> Any:
        """Rows that continue in their places [B, T, N], and a number in all other places."""
        ops = self._ops
        row = ops.constant(np.full((1, 1, _width(own)), other, np.float32), name=f"{_PREFIX}/skipped/{name}")
        places = ops.minimum(self._places, self._count)
        return self._laid(self._taken(ops.concat([own, row], 0), places))

    def _laid(self, flat: Any) -> Any:
        """[B T, 1, N] as [B, T, N]."""
        shape = self._ops.concat([self._shape, _ints([_width(flat.output(0))])], 0)
        return self._ops.reshape(flat, shape, False).output(0)


_END = int(np.iinfo(np.int64).max)


def _ints(value: Any) -> Any:
    from openvino import opset13

    return opset13.constant(np.array(value, np.int64))


def _width(value: Any) -> int:
    """Size of the last axis."""
    return int(value.get_partial_shape()[-1].get_length())
