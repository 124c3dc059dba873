"""Replaces all nodes below the first layer in which a token reads another by a table with one row a token.

    before   input_ids -- Gather(E) -- x0 W' + b -- join -- mlp -- ... -- x      layers 0 .. k-1 replaced, k kept
    after    input_ids -- Gather(T) ------------------------------------- x      T[v] = what the above makes of token v

Below that layer no token reads another. If layer 0 is replaced, the lookup saves its map and its MLP. T has the size of
E, [V, D], and takes its place if nothing else reads E; a tied head keeps E. The rows come from `token_rows`. A graph
with quantised matrices stores the rows in 8 bits.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import find_reader, reading_layers
from nbl_export.graph.emitter import add_initializer, element_type, new_node
from nbl_export.graph.files import read_graph
from nbl_export.graph.names import graph_file
from nbl_export.rewrite.bypass import norm_alone

__all__ = ["TabulateTokens", "table_bytes", "table_name"]

_BLOCK = 32  # elements that share a scale in a table of 8 bits
_ROWS = 8192  # rows quantised at once, to save memory
_NODE = "/nbl/token_table"
_TABLE = re.compile(r"nbl\.layers\.[\d-]+\.table")


def table_name(layers: int) -> str:
    """Name of the table that replaces so many first layers."""
    return f"nbl.layers.{'-'.join(map(str, sorted({0, layers - 1})))}.table"


def table_bytes(directory: Path) -> int:
    """Bytes that tables of tokens take of a deployable directory's weights."""
    constants = read_graph(directory / graph_file(directory)).graph.initializers.values()
    found = (v.const_value for v in constants if _TABLE.match(str(v.name)))
    return sum(tensor.nbytes for tensor in found if tensor is not None)


class TabulateTokens(ir.passes.InPlacePass):
    """Look up the input of the first kept layer if the layers below it are replaced; else do nothing.

    Args:
        rows: input of that layer for each token, [V, D]; None does nothing.
    """

    def __init__(self, rows: np.ndarray | None) -> None:
        super().__init__()
        self.rows = rows

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        first = reading_layers(graph)[0]
        if self.rows is None or not first:
            return ir.passes.PassResult(model, modified=False)
        ids = next((v for v in graph.inputs if v.name == "input_ids"), None)
        if ids is None:
            raise RefusalError(first, "it has no input named input_ids, by which its tokens could be looked up")
        stream = find_reader(graph, first).residual
        quantised = any(node.op_type == "MatMulNBits" for node in graph)
        dtype = element_type(graph, stream)
        lookup = _lookup(graph, table_name(first), self.rows, dtype, ids, quantised)
        value = lookup.outputs[0]
        value.type, value.shape = ir.TensorType(dtype), stream.shape
        graph.insert_before(graph[0], [lookup])
        if (maker := stream.producer()) is not None:
            norm_alone(graph, maker, value, f"{_NODE}/norm")
        stream.replace_all_uses_with(value)
        return ir.passes.PassResult(model, modified=True)


def _lookup(
    graph: ir.Graph, name: str, rows_VD: np.ndarray, dtype: ir.DataType, ids: ir.Value, quantised: bool
) -> ir.Node:
    """The node that looks up token rows as `dtype`; registers its constants."""
    if quantised and rows_VD.shape[1] % _BLOCK == 0:
        codes, scales = _quantised(rows_VD, dtype.numpy())
        table = add_initializer(graph, name, codes, ir.DataType.UINT8)
        steps = add_initializer(graph, f"{name}_scales", scales, dtype)
        attributes = {"bits": 8, "block_size": _BLOCK, "gather_axis": 0, "quantize_axis": 1}
        inputs = [table, ids, steps]
        return new_node("GatherBlockQuantized", inputs, _NODE, None, None, attributes, "com.microsoft")
    return new_node("Gather", [add_initializer(graph, name, rows_VD, dtype), ids], _NODE)


def _quantised(rows_VD: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Codes [V, D] of 8 bits around 128, and scales [V, D / _BLOCK], in the layout of GatherBlockQuantized."""
    codes = np.empty(rows_VD.shape, np.uint8)
    scales = np.empty((len(rows_VD), rows_VD.shape[1] // _BLOCK), dtype)
    for start in range(0, len(rows_VD), _ROWS):
        here = slice(start, start + _ROWS)
        blocks = rows_VD[here].reshape(-1, scales.shape[1], _BLOCK)
        scales[here] = np.abs(blocks).max(-1) / 127
        steps = scales[here].astype(np.float32)
        found = np.rint(blocks / np.where(steps == 0, 1, steps)[..., None]) + 128
        codes[here] = found.clip(0, 255).reshape(len(blocks), -1)
    return codes, scales
