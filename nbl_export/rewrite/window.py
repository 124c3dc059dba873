"""The nodes of attention over the last W tokens and the first one (`mixers.windowed`) in an ONNX graph.

    qkv -- Concat(mark) -- Pad -+- q in blocks of C rows -- rotary ------------- MatMul -- + mask -- Softmax -- MatMul
                                `- Concat(state) -- Gather: W + C rows a block -- rotary --^   `- first row --^

    rows of the state and of this step     W before | r0 r1 r2 r3 r4 r5 ...
    block 0 of C = 2                       ........................          reads W + C rows: those before, r0, r1
    block 1                                     ........................     r0 and r1 among those before, r2, r3

C is W, or the number of tokens if they are fewer. So scores grow with the tokens and not with their square, and one
token costs W + 1 scores. `WindowRows` computes what all layers share: blocks, masks and rotary tables. Its values have
names of one prefix, so that tail pruning can give a layer those of fewer rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.emitter import new_node, register
from nbl_export.mixers.windowed import WindowShape, rotary_tables

__all__ = ["SHARED", "WindowRows", "add_window_constants", "emit_window", "window_tokens"]

SHARED = ("/nbl/windows", "/nbl/states")  # begin the names of nodes whose values all windows of a graph share
_CONSTANTS = "nbl.window"
_FAR = 1e4  # taken from scores of rows that are not seen: exp is then zero, and 16 bits hold twice this number
_INTEGERS: dict[str, Any] = {"one": [1], "start": [0], "row_axis": [1], "block_axis": [2], "last_axis": [-1],
                             "front": [0] * 4, "split": [0, -1], "begin": 0, "step": 1, "back": -1}  # fmt: skip


def add_window_constants(
    graph: ir.Graph, shape: WindowShape, frequencies: np.ndarray, dtype: ir.DataType
) -> dict[str, ir.Value]:
    """Tables that all windows of a graph share, by name: registered once.

    Raises:
        RefusalError: windows of two shapes.
    """
    tokens, size = shape.tokens, shape.head_size
    cosine, sine = rotary_tables(np.arange(2 * tokens), frequencies, size)
    behind = [table * np.float32(shape.scale) for table in rotary_tables(np.array([-tokens]), frequencies, size)]
    back = tokens + np.arange(tokens)[:, None] - np.arange(2 * tokens)
    floats = {
        "key_cosine": cosine[:, None, None],
        "key_sine": sine[:, None, None],
        "query_cosine": cosine[tokens:] * np.float32(shape.scale),
        "query_sine": sine[tokens:] * np.float32(shape.scale),
        "first_cosine": behind[0].reshape(size, 1),
        "first_sine": behind[1].reshape(size, 1),
        "band": np.where((back >= 0) & (back < tokens), -_FAR, -2 * _FAR),
        "far": np.array(_FAR),
        "not_far": np.array(-_FAR),
        "zero": np.array(0.0),
    }
    kv, groups = shape.kv_heads, shape.heads // shape.kv_heads
    integers: dict[str, Any] = {
        "halves": [len(frequencies), len(frequencies), size - 2 * len(frequencies)],
        "heads": np.array([kv, groups, size]),
        "rows_of_heads": np.array([0, 0, -1, kv, 1, size]),
        "first_column": np.array([0, 1, kv, 1, size, 1]),
        "first_row": np.array([0, 1, kv, 1, 1, size]),
        "joined": np.array([0, -1, shape.query_width]),
        "parts": np.array([shape.query_width, 2 * shape.key_width + 1]),
        "row_parts": np.array([shape.key_width, shape.key_width, 1]),
        "state_parts": np.array([1, tokens]),
        "by_key": np.array([0, 0, 1, 1, 1, -1]),
        "by_query": np.array([0, 0, 1, 1, -1, 1]),
        "tokens": np.array([tokens]),
        "kept": np.arange(1, tokens + 1).reshape(1, -1, 1),
        **_INTEGERS,
    }
    arrays = {name: array.astype(dtype.numpy()) for name, array in floats.items()}
    arrays |= {name: np.array(values, np.int64) for name, values in integers.items()}
    return {name: _shared(graph, name, array) for name, array in arrays.items()}


def _shared(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    full = f"{_CONSTANTS}.{name}"
    if full not in graph.initializers:
        return register(graph, ir.tensor(array, name=full))
    value = graph.initializers[full]
    stored = value.const_value
    if stored is None or not np.array_equal(stored.numpy(), array):
        raise RefusalError(None, "its layers would have windows of several shapes; choose one")
    return value


def window_tokens(graph: ir.Graph) -> int:
    """W of the windows of a graph."""
    stored = graph.initializers[f"{_CONSTANTS}.tokens"].const_value
    assert stored is not None
    return int(stored.numpy()[0])


class WindowRows:
    """What the windows of some layers know of the rows of a step; the nodes are in `nodes`, and not in the graph yet.

    Args:
        mask_BT: 1 for a row of a token, 0 for padding.
        last_B11: index of each sequence's last token.
        prefix: begins the names of all nodes.

    Attributes:
        values: by name. marks [B, T, 1]; pads; picked [blocks, W + C]: rows of each block; size [1]: C; ...
    """

    def __init__(self, graph: ir.Graph, mask_BT: ir.Value, last_B11: ir.Value, dtype: ir.DataType, prefix: str) -> None:
        self.nodes: list[ir.Node] = []
        self.values: dict[str, ir.Value] = {}
        begin = f"{_CONSTANTS}."
        self._given = {n.removeprefix(begin): v for n, v in graph.initializers.items() if n.startswith(begin)}
        self._prefix, self._dtype = prefix, dtype
        self._count(mask_BT, last_B11)
        self._cut_tables()

    def _count(self, mask_BT: ir.Value, last_B11: ir.Value) -> None:
        """Blocks, and the indices of rows."""
        given, node = self._given, self._node
        mark = node("Cast", "mark", mask_BT, kind=self._dtype, to=int(self._dtype))
        node("Unsqueeze", "marks", mark, given["last_axis"], kind=self._dtype)
        count = node("Shape", "count", mask_BT, start=1, end=2)
        size = node("Min", "size", count, given["tokens"])
        upper = node("Sub", "upper", node("Add", "sum", count, size), given["one"])
        whole = node("Mul", "whole", node("Div", "blocks", upper, size), size)
        node("Concat", "pads", given["front"], node("Sub", "rest", whole, count), given["start"], axis=0)
        wide = node("Add", "wide", size, given["tokens"])
        node("Concat", "shares", wide, given["one"], axis=0)
        ends = {"whole": whole, "size": size, "wide": wide, "count": count}
        end = {name: node("Squeeze", f"{name}_end", value) for name, value in ends.items()}
        starts = node("Range", "starts", given["begin"], end["whole"], end["size"])
        places = node("Range", "places", given["begin"], end["wide"], given["step"])
        node("Add", "picked", node("Unsqueeze", "column", starts, given["last_axis"]), places)
        node("Concat", "by_blocks", given["split"], size, given["heads"], axis=0)
        node("Add", "last_rows", last_B11, given["kept"])
        left = node("Range", "left", end["count"], given["begin"], given["back"])
        most = node("ReduceMax", "most", node("Mul", "valid_left", mask_BT, left), given["last_axis"], keepdims=1)
        first = node("Mod", "start", node("Sub", "before", count, most), count)
        node("Unsqueeze", "first", first, given["last_axis"])

    def _cut_tables(self) -> None:
        """Tables of the rows of a block."""
        given, size, wide = self._given, self.values["size"], self.values["wide"]
        ends = {"key_cosine": wide, "key_sine": wide, "query_cosine": size, "query_sine": size, "band": size}
        for name, end in ends.items():
            title = "band_rows" if name == "band" else name
            self._node("Slice", title, given[name], given["start"], end, given["start"], kind=self._dtype)
        bounds = (given["start"], wide, given["row_axis"])
        self._node("Slice", "band", self.values["band_rows"], *bounds, kind=self._dtype)

    def _node(
        self, op: str, name: str, *inputs: ir.Value, kind: ir.DataType = ir.DataType.INT64, **attributes: int
    ) -> ir.Value:
        self.nodes.append(new_node(op, inputs, f"{self._prefix}/{name}", kind, None, attributes))
        self.values[name] = self.nodes[-1].outputs[0]
        return self.values[name]


def emit_window(
    build: Any, rows: WindowRows, given: dict[str, ir.Value], qkv: ir.Value, state: tuple[ir.Value, ir.Value]
) -> ir.Value:
    """The nodes of one layer.

    Args:
        build: makes a node: (operator, inputs, title, number of outputs, attributes) -> outputs.
        state: the layer's state, and the output that holds it behind this step.
    """
    past, present = state
    shared = rows.values
    marked = build("Concat", [qkv, shared["marks"]], "Marked", axis=-1)
    padded = build("Pad", [marked, shared["pads"]], "Padded")
    q, new = build("Split", [padded, given["parts"]], "Parts", outputs=2, axis=-1)
    first, before = build("Split", [past, given["state_parts"]], "Past", outputs=2, axis=1)
    every = build("Concat", [before, new], "Rows", axis=1)
    first = _first_row(build, shared, given, first, new)
    kept = build("GatherND", [every, shared["last_rows"]], "Kept", batch_dims=1)
    build("Concat", [first, kept], "Present", into=present, axis=1)
    picked = build("Gather", [every, shared["picked"]], "Blocks", axis=1)
    key, value, mark = build("Split", [picked, given["row_parts"]], "BlockParts", outputs=3, axis=-1)
    first_key, first_value, _ = build("Split", [first, given["row_parts"]], "FirstParts", outputs=3, axis=-1)
    q = build("Reshape", [q, shared["by_blocks"]], "Queries")
    q = build("Transpose", [q], "QueryHeads", perm=[0, 1, 3, 4, 2, 5])
    key = build("Reshape", [key, given["rows_of_heads"]], "Keys")
    key = _rotated(build, given, key, (shared["key_cosine"], shared["key_sine"]), "Key", -1)
    key = build("Transpose", [key], "KeyHeads", perm=[0, 1, 3, 4, 5, 2])
    turned = _rotated(build, given, q, (shared["query_cosine"], shared["query_sine"]), "Query", -1)
    far = build("Mul", [mark, given["far"]], "Far")
    bias = build("Add", [build("Reshape", [far, given["by_key"]], "FarByKey"), shared["band"]], "Seen")
    scores = build("Add", [build("MatMul", [turned, key], "Scores"), bias], "Near")
    last = _first_scores(build, shared, given, q, (first_key, far))
    share = build("Softmax", [build("Concat", [scores, last], "AllScores", axis=-1)], "Softmax", axis=-1)
    near, rest = build("Split", [share, shared["shares"]], "Shares", outputs=2, axis=-1)
    value = build("Reshape", [value, given["rows_of_heads"]], "Values")
    value = build("Transpose", [value], "ValueHeads", perm=[0, 1, 3, 4, 2, 5])
    first_value = build("Reshape", [first_value, given["first_row"]], "FirstValue")
    out = build(
        "Add", [build("MatMul", [near, value], "NearOut"), build("Mul", [rest, first_value], "FirstOut")], "Out"
    )
    out = build("Transpose", [out], "ByRow", perm=[0, 1, 4, 2, 3, 5])
    out = build("Reshape", [out, given["joined"]], "Joined")
    return build("Slice", [out, given["start"], shared["count"], given["row_axis"]], "Heads")


def _first_row(
    build: Any, shared: dict[str, ir.Value], given: dict[str, ir.Value], past: ir.Value, new: ir.Value
) -> ir.Value:
    """The row of the first token: of the state if it holds one, else of the first token of this step."""
    mark = build("Split", [past, given["row_parts"]], "PastParts", outputs=3, axis=-1)[2]
    known = build("Greater", [mark, given["zero"]], "Known", kind=ir.DataType.BOOL)
    found = build("GatherND", [new, shared["first"]], "FirstNew", batch_dims=1)
    return build("Where", [known, past, found], "First")


def _first_scores(
    build: Any, shared: dict[str, ir.Value], given: dict[str, ir.Value], q: ir.Value, row: tuple[ir.Value, ir.Value]
) -> ir.Value:
    """Scores of the first row [.., C, 1], which is seen if the row in front of a token's window holds a token."""
    key, far = row
    key = build("Reshape", [key, given["first_column"]], "FirstKey")
    key = _rotated(build, given, key, (given["first_cosine"], given["first_sine"]), "FirstKey", 4)
    bounds = [given["start"], shared["size"], given["block_axis"]]
    left = build("Reshape", [build("Slice", [far, *bounds], "LeftRows"), given["by_query"]], "LeftByQuery")
    bias = build("Add", [left, given["not_far"]], "Left")
    return build("Add", [build("MatMul", [q, key], "FirstScores"), bias], "FirstSeen")


def _rotated(
    build: Any, given: dict[str, ir.Value], head: ir.Value, tables: tuple[ir.Value, ir.Value], title: str, axis: int
) -> ir.Value:
    left, right, rest = build("Split", [head, given["halves"]], f"{title}Halves", outputs=3, axis=axis)
    other = build("Concat", [right, left, rest], f"{title}Swapped", axis=axis)  # a Gather of numbers takes far longer
    parts = (build("Mul", [head, tables[0]], f"{title}Cosine"), build("Mul", [other, tables[1]], f"{title}Sine"))
    return build("Add", list(parts), f"{title}Turned")
