"""Puts the codes of a GGUF file in place of a float32 graph's matrices; every value stays the same.

    before   MatMul(x, W')           after   MatMulNBits(x, codes, scales) [-- Add(block sums of x times offsets)]
             Gather(E, ids)                  GatherBlockQuantized(codes, ids, scales) [-- Add(offsets of the rows)]

Q4_0, Q2_K to Q4_K and Q4_1 become 4-bit codes, the others 8-bit codes; types with a minimum get offsets
(`graph.coded.block_sums`). A matrix whose rows have several forms, such as q, k and v joined, becomes one product a
form and a Concat. A tied head shares its codes with the embedding. Matrices that the file stores as floats stay. A
matrix that the file does not have is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from nbl_export.errors import NblError, RefusalError
from nbl_export.formats.gguf.files import read_content
from nbl_export.formats.gguf.row_index import RowIndex
from nbl_export.graph.passes import run_passes
from nbl_export.records.block_codes import BlockCodes
from nbl_export.rewrite.coded.nodes import lookup_nodes, product_nodes, put
from nbl_export.rewrite.sweep import Sweep

__all__ = ["TakeCodes", "take_codes"]

ACCURACY = 4  # activations are rounded to 8 bits


def take_codes(graph: Path, gguf: Path, out: Path, accuracy: int = ACCURACY) -> None:
    """Write a float32 graph with the codes of a GGUF file into a directory, under the same name.

    Args:
        accuracy: `accuracy_level` of the products: 1 computes with float32 activations, 4 rounds them to 8 bits.

    Raises:
        NblError: a type is unknown, or the file stores no matrix in blocks.
        RefusalError: the graph has a matrix that the file does not have.
    """
    model = ir.load(graph)
    run_passes([TakeCodes(RowIndex(read_content(gguf)), accuracy), Sweep()], model)
    if not any(node.op_type == "MatMulNBits" for node in model.graph):
        raise NblError(f"{gguf} stores its matrices as floats; use --precision fp32, or --requantize for int8 or int4")
    ir.save(model, out / graph.name, external_data=f"{graph.name}.data")


class TakeCodes(ir.passes.InPlacePass):
    """Replace each product with, and lookup in, a matrix of the file by its form in codes."""

    def __init__(self, rows: RowIndex, accuracy: int = ACCURACY) -> None:
        super().__init__()
        self.rows = rows
        self.accuracy = accuracy

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        changed = False
        for node in list(graph):
            weight = _weight(node)
            if weight is None:
                continue
            matrix, name = _matrix(node, weight), str(weight.name)
            parts = self.rows.codes_of(matrix)
            if parts is None:
                raise RefusalError(None, f"{name} of {node.name} has rows that are not in the GGUF file")
            if not parts:
                continue
            make = _lookup if node.op_type == "Gather" else self._products
            put(graph, node, make(graph, node, name, parts))
            changed = True
        return ir.passes.PassResult(model, modified=changed)

    def _products(self, graph: ir.Graph, node: ir.Node, name: str, parts: Sequence[BlockCodes]) -> list[ir.Node]:
        made: list[ir.Node] = []
        ends = []
        for number, part in enumerate(parts):
            suffix = f".{number}" if len(parts) > 1 else ""
            title = f"{node.name}{suffix}_Q{part.bits}"
            made += product_nodes(graph, node, f"{name}{suffix}", title, part, self.accuracy)
            ends.append(made[-1].outputs[0])
        if len(parts) > 1:
            made.append(ir.node("Concat", ends, {"axis": -1}, name=f"{node.name}/Concat"))
        return made


def _weight(node: ir.Node) -> ir.Value | None:
    """The stored matrix of a product or of a lookup of rows; None for another node."""
    if node.op_type not in ("MatMul", "Gather"):
        return None
    value = node.inputs[0 if node.op_type == "Gather" else 1]
    maker = None if value is None else value.producer()
    if node.op_type == "Gather" and maker is not None and maker.op_type == "Transpose":
        value = maker.inputs[0]
    if value is None or value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT:
        return None
    return value if len(value.const_value.shape) == 2 else None


def _matrix(node: ir.Node, weight: ir.Value) -> np.ndarray:
    """The matrix as a GGUF file stores it: [outputs, inputs], or one row a token."""
    assert weight.const_value is not None
    stored = weight.const_value.numpy()
    as_stored = node.op_type == "Gather" and node.inputs[0] is weight
    return stored if as_stored else np.ascontiguousarray(stored.T)


def _lookup(graph: ir.Graph, node: ir.Node, name: str, parts: Sequence[BlockCodes]) -> list[ir.Node]:
    if len(parts) > 1:
        raise RefusalError(None, f"the rows of {name} have several types in the GGUF file")
    return lookup_nodes(graph, node, name, parts[0])
