"""The nodes of attention over the last W tokens and the first one (`mixers.windowed`) in an IR.

    qkv -+- q in blocks of C rows -- rotary ----------------------------- MatMul -- Select -- Softmax -- MatMul -- heads
         `- keys, values, mark -- Concat(state) -- Gather: rows of a block --^                             ^
                                     `- first row, last W rows -- Assign  `--------------------------------'

    a block reads     the W + C rows up to its last one, and the first row of the text

C is W, or the number of tokens if they are fewer. So scores grow with the tokens and not with their square. A batch is
padded on the left: the last rows of a step are tokens of every sequence, and the first token stands behind padding.
All nodes of a layer follow from its own node `VALID`, so that tail pruning (`tail`) can give it fewer rows. Tables stay
float32 at every precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nbl_export.mixers.windowed import WindowShape, rotary_tables
from nbl_export.targets.openvino.rewrite.nodes import TOKENS, cut, integers, length, places, split

__all__ = ["TABLES", "VALID", "WINDOW", "emit_window", "first_token"]

TABLES = "nbl.window."  # begins the names of rotary tables and masks
VALID, WINDOW = "Valid", "Window"  # titles of the nodes that say which rows are tokens, and that give the heads
_UNSEEN = np.float32(-1e4)  # score of a row that is not seen: exp is then zero, and 16 bits hold it


def emit_window(
    valid_BT: Any, qkv: Any, past: Any, shape: WindowShape, frequencies: np.ndarray, layer: int
) -> tuple[Any, Any]:
    """What the heads of a layer make of the tokens of a step [B, T, Q], and the state behind them.

    Args:
        valid_BT: 1 for a token of this step, 0 for padding.
        qkv: queries, keys and values, [B, T, Q + 2 K].
        past: the state before the step, [B, W + 1, 2 K + 1].
    """
    from openvino import opset13 as ops

    blocks, row = _Blocks(valid_BT, shape), 2 * shape.key_width
    q, new = split(qkv, [shape.query_width, row], -1)
    new = ops.concat([new, ops.unsqueeze(valid_BT, integers([-1]))], -1)
    first, before = split(past, [1, shape.tokens], TOKENS)
    known = ops.greater(split(first, [row, 1], -1)[1], np.float32(0))
    first = ops.select(known, first, ops.gather(new, first_token(valid_BT), integers(TOKENS), 1))
    rows = ops.concat([before, new], TOKENS)
    every = ops.concat([blocks.filled(rows, row + 1), first], TOKENS)
    read = ops.gather(every, blocks.picked, integers(TOKENS))
    tables = _Tables(blocks, shape, frequencies, f"{TABLES}{layer}.")
    heads = _attended(blocks, tables, q, read)
    return heads, ops.concat([first, cut(rows, -shape.tokens)], TOKENS)


def first_token(valid_BT: Any) -> Any:
    """Place [B, 1] of each sequence's first token; padding is on the left."""
    from openvino import opset13 as ops

    count = length(valid_BT)
    tokens = ops.convert(ops.reduce_sum(valid_BT, integers([TOKENS]), keep_dims=True), "i64")
    return ops.minimum(ops.subtract(count, tokens), ops.subtract(count, integers([1])))


class _Blocks:
    """Blocks of the rows of a step.

    Attributes:
        count, size, wide: T, C and W + C; [1].
        picked: rows that each block reads, [blocks, W + C + 1]: of W rows of the state, filled rows and the first row.
    """

    def __init__(self, valid_BT: Any, shape: WindowShape) -> None:
        from openvino import opset13

        self.ops: Any = opset13
        ops, one, tokens = self.ops, integers([1]), integers([shape.tokens])
        self._batch, self.count = length(valid_BT, 0), length(valid_BT)
        self.shape, self.size = shape, ops.minimum(self.count, tokens)
        self.wide = ops.add(self.size, tokens)
        number = ops.divide(ops.add(self.count, ops.subtract(self.size, one)), self.size)
        whole = ops.multiply(number, self.size)
        self._rest = ops.subtract(whole, self.count)
        starts = ops.unsqueeze(places(integers([0]), whole, self.size), one)
        rows = ops.add(starts, places(integers([0]), self.wide, one))
        behind = ops.broadcast(ops.add(whole, tokens), ops.concat([number, one], 0))
        self.picked = ops.concat([rows, behind], 1)

    def filled(self, value: Any, width: int) -> Any:
        """A value [B, rows, width] with rows of zeros that fill the last block."""
        zeros = self.ops.broadcast(np.float32(0), self.dims(self._batch, self._rest, width))
        return self.ops.concat([value, zeros], TOKENS)

    def joined(self, out: Any) -> Any:
        """Heads of blocks [N, C, heads, d] as rows of the step, [B, T, Q]."""
        out = self.ops.reshape(out, self.dims(self._batch, -1, self.shape.query_width), False)
        return cut(out, 0, self.count)

    def dims(self, *lengths: Any) -> Any:
        """A shape of numbers and of values [1]."""
        return self.ops.concat([integers([n]) if isinstance(n, int) else n for n in lengths], 0)


class _Tables:
    """Constants of a layer, cut to the rows of a block.

    Attributes:
        halves: numbers of a head that a rotation exchanges, and the rest.
        query, key, far: cosines and sines of queries and keys [rows, 1, d], and of the first row [1, 1, d].
        near: which rows of a block are less than W back, [C, W + C].
    """

    def __init__(self, blocks: _Blocks, shape: WindowShape, frequencies: np.ndarray, prefix: str) -> None:
        tokens, size, scale = shape.tokens, shape.head_size, np.float32(shape.scale)
        self._prefix, self._ops, pairs = prefix, blocks.ops, len(frequencies)
        self.halves = [n for n in (pairs, pairs, size - 2 * pairs) if n]
        turned = [table[:, None] for table in rotary_tables(np.arange(2 * tokens), frequencies, size)]
        far = [table[:, None] * scale for table in rotary_tables(np.array([-tokens]), frequencies, size)]
        back = tokens + np.arange(tokens)[:, None] - np.arange(2 * tokens)
        self.key = [cut(self._held(f"key_{k}", t), 0, blocks.wide, 0) for k, t in enumerate(turned)]
        query = [self._held(f"query_{k}", t[tokens:] * scale) for k, t in enumerate(turned)]
        self.query = [cut(table, 0, blocks.size, 0) for table in query]
        self.far = [self._held(f"far_{k}", t) for k, t in enumerate(far)]
        near = cut(self._held("near", (back >= 0) & (back < tokens)), 0, blocks.size, 0)
        self.near = cut(near, 0, blocks.wide, 1)

    def _held(self, name: str, array: np.ndarray) -> Any:
        return self._ops.constant(np.ascontiguousarray(array), name=f"{self._prefix}{name}")


def _attended(blocks: _Blocks, tables: _Tables, q: Any, rows: Any) -> Any:
    """Attention of N = B x blocks blocks.

    Args:
        q: queries [B, T, Q].
        rows: what each block reads, [B, blocks, W + C + 1, 2 K + 1]; the first row of the text stands last.
    """
    ops, shape, dims, size = blocks.ops, blocks.shape, blocks.dims, blocks.size
    kv, groups, wide = shape.kv_heads, shape.heads // shape.kv_heads, ops.add(blocks.wide, integers([1]))
    rows = ops.reshape(rows, dims(-1, wide, 2 * shape.key_width + 1), False)
    key, value, mark = split(rows, [shape.key_width, shape.key_width, 1], -1)
    key, value = (ops.reshape(part, integers([0, 0, kv, shape.head_size]), True) for part in (key, value))
    near, far = split(key, [blocks.wide, 1], TOKENS)
    q = ops.reshape(blocks.filled(q, shape.query_width), dims(-1, size, shape.heads, shape.head_size), False)

    def scores(query: Any, keys: Any) -> Any:
        """[N, kv, groups, C, keys]."""
        query = ops.transpose(query, integers([0, 2, 1, 3]))
        query = ops.reshape(query, integers([0, kv, -1, shape.head_size]), True)
        found = ops.matmul(query, ops.transpose(keys, integers([0, 2, 3, 1])), False, False)
        return ops.reshape(found, dims(0, kv, groups, size, -1), True)

    by_near = scores(_rotated(tables, q, tables.query), _rotated(tables, near, tables.key))
    both = ops.concat([by_near, scores(q, _rotated(tables, far, tables.far))], -1)
    share = ops.softmax(ops.select(_seen(blocks, tables, mark), both, _UNSEEN), -1)
    out = ops.matmul(
        ops.reshape(share, dims(0, kv, -1, wide), True), ops.transpose(value, integers([0, 2, 1, 3])), False, False
    )
    out = ops.reshape(out, dims(0, shape.heads, size, shape.head_size), True)
    return blocks.joined(ops.transpose(out, integers([0, 2, 1, 3])))


def _seen(blocks: _Blocks, tables: _Tables, mark: Any) -> Any:
    """Which rows a token of a block sees, [N, 1, 1, C, W + C + 1].

    The first row of the text is seen if the row in front of the token's window holds a token.
    """
    ops = blocks.ops
    held = ops.greater(ops.reshape(mark, integers([0, 1, 1, 1, -1]), True), np.float32(0))
    near = ops.logical_and(split(held, [blocks.wide, 1], -1)[0], tables.near)
    left = ops.reshape(cut(held, 0, blocks.size, 4), integers([0, 1, 1, -1, 1]), True)
    return ops.concat([near, left], -1)


def _rotated(tables: _Tables, value: Any, turns: Sequence[Any]) -> Any:
    """Heads [N, rows, heads, d], turned by cosines and sines."""
    from openvino import opset13 as ops

    left, right, *more = split(value, tables.halves, -1)
    other = ops.concat([right, left, *more], -1)
    return ops.add(ops.multiply(value, turns[0]), ops.multiply(other, turns[1]))
