"""The `methods.base.Builder` of ONNX graphs, for what a mixer in place of attention adds: products and additions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nbl_export.graph.emitter import add_initializer, new_node
from nbl_export.graph.names import constant_name, node_name, product_name

__all__ = ["GraphBuilder"]


class GraphBuilder:
    """Makes the nodes of one layer; they are in `nodes`, in order, and not in the graph yet.

    Args:
        shape: of the layer's input.
    """

    def __init__(self, graph: ir.Graph, layer: int, dtype: ir.DataType, shape: ir.Shape | None) -> None:
        self.nodes: list[ir.Node] = []
        self._graph = graph
        self._layer = layer
        self._dtype = dtype
        self._shape = shape

    def matmul(self, x: ir.Value, matrix: np.ndarray, name: str) -> ir.Value:
        transposed = np.ascontiguousarray(matrix.T)  # as MatMul takes it
        title = product_name(self._layer, name).rpartition("/")[2]
        shape = None if self._shape is None else ir.Shape([*self._shape[:-1], matrix.shape[0]])
        return self._add_node("MatMul", [x, self._constant(name, transposed)], title, shape)

    def add(self, x: ir.Value, vector: np.ndarray, name: str) -> ir.Value:
        return self._add_node("Add", [x, self._constant(name, vector)], "Add", x.shape)

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        return add_initializer(self._graph, constant_name(self._layer, name), array, self._dtype)

    def _add_node(self, op: str, inputs: list[ir.Value], title: str, shape: ir.Shape | None) -> ir.Value:
        node = new_node(op, inputs, node_name(self._layer, title), self._dtype, shape)
        self.nodes.append(node)
        return node.outputs[0]
