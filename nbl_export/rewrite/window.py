"""The nodes of attention over the last W tokens and the first one (`mixers.windowed`) in an ONNX graph.

    If(one token, behind others)
      then   past -- first row, W - 1 rows, own row -+- present
                                                     +- keys -- rotary -- MatMul(q) -- + mask -- Softmax -- MatMul -+
                                                     `- values -----------------------------------------------------^
      else   q in blocks of C rows -- rotary ---------------------------- MatMul -- + mask -- Softmax -- MatMul -- heads
             first row, W before, rows of this step -- Gather: those of a block -^

    rows of the state and of this step     W before | r0 r1 r2 r3 r4 r5 ...
    block 0 of C = 2                       ........................          reads W + C rows: those before, r0, r1
    block 1                                     ........................     r0 and r1 among those before, r2, r3

    state [B, 2 heads of keys, W + 1, d]   keys (not rotated), then values; row 0 is the first token's, W the last one's

C is W, or the number of tokens if they are fewer. So scores grow with the tokens and not with their square. One token
takes a dozen nodes, because each node costs a runtime as much time as hundreds of its numbers. Both branches rotate
keys by one table, whose row W is position 0. The mask of the text says how many rows of a state hold a token.
`WindowStep` has what all windows of a graph share.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.emitter import Maker, choose, register
from nbl_export.mixers.windowed import WindowShape, rotary_tables

__all__ = ["SHARED", "WindowStep", "emit_window", "state_dims", "window_tokens"]

SHARED = ("/nbl/windows", "/nbl/states")  # begin the names of nodes whose values all windows of a graph share
_CONSTANTS = "nbl.window"
_UNSEEN = -1e4  # added to scores of rows that are not seen: exp is then zero, and 16 bits hold this number
_INT, _BOOL = ir.DataType.INT64, ir.DataType.BOOL
_CONTRIB = "com.microsoft"  # of RotaryEmbedding, which ONNX has from opset 23 on


def state_dims(shape: WindowShape) -> tuple[int, int, int]:
    """Dimensions of a layer's state, behind that of the batch."""
    return 2 * shape.kv_heads, shape.tokens + 1, shape.head_size


def window_tokens(graph: ir.Graph) -> int:
    """W of the windows of a graph."""
    stored = graph.initializers[f"{_CONSTANTS}.band"].const_value
    assert stored is not None
    return int(stored.shape.numpy()[0])


class WindowStep:
    """What all windows of a graph know of a step; the nodes are in `nodes`, and not in the graph yet.

    Args:
        all_BS: 1 for a token, 0 for padding, from the start of the text.
        mask_BT: the same of the tokens of this step.
        last_B11: index of each sequence's last token among these.

    Attributes:
        before: tokens before this step, [B, 1].
        single: whether each sequence has one new token, and not its first.
        seen: what the scores of one new token get, for each row of a state, [B, 1, 1, W + 1].
    """

    def __init__(
        self, graph: ir.Graph, dtype: ir.DataType, all_BS: ir.Value, mask_BT: ir.Value, last_B11: ir.Value,
        shape: WindowShape, frequencies: np.ndarray,
    ) -> None:  # fmt: skip
        self.dtype, self.mask_BT, self.last_B11 = dtype, mask_BT, last_B11
        self._graph = graph
        graph.opset_imports.setdefault(_CONTRIB, 1)
        tables, make = self.tables(shape, frequencies), Maker(f"{SHARED[0]}/", _INT)
        known, new = (
            make("ReduceSum", title, mask, self.integers([1])) for title, mask in (("known", all_BS), ("new", mask_BT))
        )
        self.before = make("Sub", "before", known, new)
        held = make("Min", "held", self.before, self.integers([shape.tokens]))
        self.seen = make("Gather", "seen", tables["seen"], held, kind=dtype)
        follows = make("ReduceMin", "follows", make("Mul", "behind", mask_BT, self.before), keepdims=0)
        follows = make("Greater", "follow", follows, self.integers(0), kind=_BOOL)
        alone = make("Equal", "alone", make("Shape", "count", mask_BT, start=1, end=2), self.integers([1]), kind=_BOOL)
        self.single = make("And", "single", alone, follows, kind=_BOOL)
        self.nodes = make.nodes

    def tables(self, shape: WindowShape, frequencies: np.ndarray) -> dict[str, ir.Value]:
        """Constants by name, registered once.

        Raises:
            RefusalError: another window of the graph has others.
        """
        tokens, pairs = shape.tokens, len(frequencies)
        cosine, sine = rotary_tables(np.arange(-tokens, 2 * tokens), frequencies, shape.head_size)
        back = tokens + np.arange(tokens)[:, None] - np.arange(2 * tokens)
        rows = tokens - np.arange(tokens + 1)  # how far back the rows of a state are
        floats = {
            "cosine": cosine[:, :pairs],
            "sine": sine[:, pairs : 2 * pairs],
            "seen": np.where(rows <= np.arange(tokens + 1)[:, None], 0, _UNSEEN)[:, None],
            "scale": np.array(shape.scale),
            "zero": np.array(0.0),
            "unseen": np.array(_UNSEEN),
        }
        arrays = {name: array.astype(self.dtype.numpy()) for name, array in floats.items()}
        arrays["band"] = (back >= 0) & (back < tokens)
        arrays["last_rows"] = np.arange(2, tokens + 2, dtype=np.int64).reshape(1, -1, 1)
        arrays["held_rows"] = np.arange(tokens, dtype=np.int64)[None, ::-1]
        return {name: self._held(name, array) for name, array in arrays.items()}

    def integers(self, values: Any) -> ir.Value:
        """A constant of integers."""
        return self._held(str(values).replace(" ", ""), np.array(values, np.int64))

    def _held(self, name: str, array: np.ndarray) -> ir.Value:
        full = f"{_CONSTANTS}.{name}"
        if full not in self._graph.initializers:
            return register(self._graph, ir.tensor(array, name=full))
        value = self._graph.initializers[full]
        stored = value.const_value
        if stored is None or not np.array_equal(stored.numpy(), array):
            raise RefusalError(None, "its layers would have windows of several shapes; choose one")
        return value


def emit_window(
    step: WindowStep, shape: WindowShape, frequencies: np.ndarray, qkv: ir.Value, past: ir.Value, present: ir.Value,
    prefix: str,
) -> ir.Node:  # fmt: skip
    """The node of one layer; its first output is what the heads give, [B, T, Q].

    Args:
        qkv: queries, keys and values of the tokens of this step, [B, T, Q + 2 K].
        present: becomes the second output, the state behind the step.
        prefix: name of the node; begins the names of all nodes inside it.
    """
    one = _One(step, shape, frequencies, f"{prefix}One").emit(qkv, past)
    more = _Chunk(step, shape, frequencies, f"{prefix}Chunk").emit(qkv, past)
    return choose(step.single, one, more, prefix, {1: present})


class _Branch:
    """What both branches of a layer have in common. N is the batch, times the blocks of a sequence."""

    def __init__(self, step: WindowStep, shape: WindowShape, frequencies: np.ndarray, prefix: str) -> None:
        self.make, self.integers = Maker(prefix, step.dtype), step.integers
        self.step, self.shape, self.tables = step, shape, step.tables(shape, frequencies)
        self._rotary, self._prefix = 2 * len(frequencies), prefix

    def parts(self, qkv: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Queries [B, T, Q], times the factor of scores; keys and values [B, T, 2 K]."""
        parts = self.integers([self.shape.query_width, 2 * self.shape.key_width])
        q, new = self.make("Split", "Parts", qkv, parts, outputs=2, axis=-1)
        return self.make("Mul", "Scaled", q, self.tables["scale"]), new

    def turned(self, heads: ir.Value, place: int, number: int, title: str) -> ir.Value:
        """A number of heads [N, heads, rows, d], rotated; their first row is row `place` of the tables."""
        partly: dict[str, Any] = {"num_heads": number, "rotary_embedding_dim": self._rotary}
        inputs = (heads, self.integers([place]), self.tables["cosine"], self.tables["sine"])
        partly = {} if self._rotary == self.shape.head_size else partly
        return self.make("RotaryEmbedding", title, *inputs, domain=_CONTRIB, **partly)

    def columns(self, rows: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Rotated keys [N, kv, d, rows] and values [N, kv, rows, d] of rows [N, 2 kv, rows, d]; row 0 is the first."""
        kv = self.shape.kv_heads
        key, value = self.make("Split", "KeysAndValues", rows, self.integers([kv, kv]), outputs=2, axis=1)
        return self.make("Transpose", "Columns", self.turned(key, 0, kv, "Keys"), perm=[0, 1, 3, 2]), value

    def graph(self, *outputs: ir.Value) -> ir.Graph:
        return ir.Graph((), outputs, nodes=self.make.nodes, name=self._prefix)


class _One(_Branch):
    """One new token, behind others. Its query has position 0 and is not rotated."""

    def emit(self, qkv: ir.Value, past: ir.Value) -> ir.Graph:
        make, shape, integers = self.make, self.shape, self.integers
        kv, size = shape.kv_heads, shape.head_size
        q, new = self.parts(qkv)
        q = make("Reshape", "Queries", q, integers([-1, kv, shape.heads // kv, size]))
        new = make("Reshape", "New", new, integers([-1, 2 * kv, 1, size]))
        first, _, rest = make("Split", "Past", past, integers([1, 1, shape.tokens - 1]), outputs=3, axis=2)
        present = make("Concat", "Present", first, rest, new, axis=2)
        key, value = self.columns(present)
        scores = make("Add", "Seen", make("MatMul", "Scores", q, key), self.step.seen)
        out = make("MatMul", "Heads", make("Softmax", "Softmax", scores, axis=-1), value)
        return self.graph(make("Reshape", "Joined", out, integers([-1, 1, shape.query_width])), present)


class _Chunk(_Branch):
    """Any tokens, with padding: blocks of C queries, each with its W + C rows and the first one."""

    def emit(self, qkv: ir.Value, past: ir.Value) -> ir.Graph:
        make, shape, dims = self.make, self.shape, self._dims
        kv, heads, size = shape.kv_heads, shape.heads, shape.head_size
        q, new = self.parts(qkv)
        self._count()
        rows, present = self._rows(new, past)
        rows = make("Gather", "Blocks", rows, self._picked, axis=1)
        rows = make("Reshape", "BlockRows", rows, dims("RowDims", -1, self._read, 2 * kv, size))
        key, value = self.columns(make("Transpose", "BlockHeads", rows, perm=[0, 2, 1, 3]))
        key = make("Split", "FirstAndNear", key, dims("KeyParts", 1, self._wide), outputs=2, axis=-1)
        q = make("Pad", "Padded", q, dims("Pads", 0, 0, 0, 0, self._rest, 0))
        q = make("Reshape", "BlockQueries", q, dims("QueryDims", -1, self._size, heads, size))
        q = make("Transpose", "Queries", q, perm=[0, 2, 1, 3])
        queries = (q, self.turned(q, shape.tokens + 1, heads, "Turned"))
        groups = self.integers([0, kv, -1, size])
        both = [
            make("MatMul", f"{title}Scores", make("Reshape", f"{title}Groups", query, groups), keys)
            for title, query, keys in zip(("First", "Near"), queries, key, strict=True)
        ]
        scores = make("Concat", "Scores", *both, axis=-1)
        scores = make("Reshape", "ByHead", scores, dims("ScoreDims", 0, heads, -1, self._read))
        share = make("Softmax", "Softmax", make("Add", "Seen", scores, self._seen()), axis=-1)
        share = make("Reshape", "ByGroup", share, dims("ShareDims", 0, kv, -1, self._read))
        out = make("Reshape", "Heads", make("MatMul", "Out", share, value), self.integers([0, heads, -1, size]))
        out = make("Transpose", "ByRow", out, perm=[0, 2, 1, 3])
        batch = self._int("Shape", "Batch", self.step.mask_BT, start=0, end=1)
        out = make("Reshape", "Joined", out, dims("OutDims", batch, self._whole, shape.query_width))
        out = make("Slice", "Given", out, self.integers([0]), self._tokens, self.integers([1]))
        return self.graph(out, present)

    def _int(self, op: str, name: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        made: ir.Value = self.make(op, name, *inputs, kind=_INT, **attributes)
        return made

    def _dims(self, name: str, *lengths: ir.Value | int) -> ir.Value:
        """Numbers and values [1], one after another."""
        parts = [self.integers([n]) if isinstance(n, int) else n for n in lengths]
        return self._int("Concat", name, *parts, axis=0)

    def _count(self) -> None:
        """Lengths [1], and the rows that each block reads, of [first row | W before | this step | fill]."""
        node, integers, window = self._int, self.integers, self.integers([self.shape.tokens])
        self._tokens = node("Shape", "Tokens", self.step.mask_BT, start=1, end=2)
        self._size = node("Min", "Size", self._tokens, window)
        upper = node("Sub", "Upper", node("Add", "Sum", self._tokens, self._size), integers([1]))
        self._whole = node("Mul", "Whole", node("Div", "Number", upper, self._size), self._size)
        self._rest = node("Sub", "Rest", self._whole, self._tokens)
        self._wide = node("Add", "Wide", self._size, window)
        self._read = node("Add", "Read", self._wide, integers([1]))
        ends = [node("Squeeze", f"{title}End", value) for title, value in
                (("Whole", self._whole), ("Size", self._size), ("Read", self._read))]  # fmt: skip
        column = node("Unsqueeze", "Column", node("Range", "Starts", integers(0), *ends[:2]), integers([1]))
        self._near = node("Add", "NearRows", column, node("Range", "Places", integers(1), ends[2], integers(1)))
        self._picked = node("Concat", "Picked", node("Sub", "FirstRows", column, column), self._near, axis=1)

    def _rows(self, new: ir.Value, past: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Rows [B, 1 + W + T + fill, 2 K] from which blocks take theirs, and the state behind the step."""
        make, node, integers = self.make, self._int, self.integers
        shape, step, row = self.shape, self.step, 2 * self.shape.key_width
        past = make("Transpose", "PastRows", past, perm=[0, 2, 1, 3])
        past = make("Reshape", "Past", past, integers([0, 0, row]))
        held, before = make("Split", "PastParts", past, integers([1, shape.tokens]), outputs=2, axis=1)
        known = make("Greater", "AnyBefore", step.before, integers(0), kind=_BOOL)
        known = make("Unsqueeze", "Known", known, integers([-1]), kind=_BOOL)
        first = make("Where", "First", known, held, make("GatherND", "FirstNew", new, self._start(), batch_dims=1))
        every = make("Concat", "Rows", first, before, new, axis=1)
        last = node("Add", "LastRows", step.last_B11, self.tables["last_rows"])
        kept = make("Concat", "Kept", first, make("GatherND", "Last", every, last, batch_dims=1), axis=1)
        kept = make("Reshape", "KeptHeads", kept, integers([0, 0, 2 * shape.kv_heads, shape.head_size]))
        filled = make("Pad", "Filled", every, self._dims("Fill", 0, 0, 0, 0, self._rest, 0))
        return filled, make("Transpose", "Present", kept, perm=[0, 2, 1, 3])

    def _start(self) -> ir.Value:
        """Index [B, 1, 1] of each sequence's first token in this step; 0 if it has none."""
        node, integers = self._int, self.integers
        left = node("Range", "RowsLeft", node("Squeeze", "TokensEnd", self._tokens), integers(0), integers(-1))
        most = node("Mul", "ValidLeft", self.step.mask_BT, left)
        most = node("ReduceMax", "Most", most, integers([1]), keepdims=1)
        start = node("Mod", "Start", node("Sub", "Lacking", self._tokens, most), self._tokens)
        return node("Unsqueeze", "StartIndex", start, integers([-1]))

    def _seen(self) -> ir.Value:
        """What scores get, [N, 1, C, 1 + W + C]. The first row is seen if a token stands in front of the window."""
        make, node, integers = self.make, self._int, self.integers
        before = node("Sub", "HeldRows", self.step.before, self.tables["held_rows"])
        marks = node("Concat", "Marks", self.step.before, before, self.step.mask_BT, axis=1)
        marks = node("Pad", "FilledMarks", marks, self._dims("MarkPads", 0, 0, 0, self._rest))
        marks = node("Gather", "BlockMarks", marks, self._near, axis=1)
        marks = node("Reshape", "MarksByKey", marks, self._dims("MarkDims", -1, 1, 1, self._wide))
        held = make("Greater", "Held", marks, integers(0), kind=_BOOL)
        left = make("Slice", "LeftRows", held, integers([0]), self._size, integers([3]), kind=_BOOL)
        left = make("Transpose", "Left", left, perm=[0, 1, 3, 2], kind=_BOOL)
        ends = self._dims("BandEnds", self._size, self._wide)
        band = make("Slice", "Band", self.tables["band"], integers([0, 0]), ends, integers([0, 1]), kind=_BOOL)
        near = make("And", "NearSeen", held, band, kind=_BOOL)
        seen = make("Concat", "AllSeen", left, near, axis=-1, kind=_BOOL)
        return make("Where", "Unseen", seen, self.tables["zero"], self.tables["unseen"])
