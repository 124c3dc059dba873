"""Small integer nodes that say which positions are computed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nbl_export.graph.emitter import register

__all__ = ["Emitter"]


class Emitter:
    """Makes int64 nodes, which are not in the graph yet, and constants, which are.

    Args:
        prefix, constants: begin the names of nodes and of constants.
    """

    def __init__(self, graph: ir.Graph, prefix: str, constants: str) -> None:
        self.nodes: list[ir.Node] = []
        self._graph, self._prefix, self._constants = graph, prefix, constants

    def __call__(self, op: str, name: str, *operands: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op, operands, attributes=attributes, name=f"{self._prefix}/{name}")
        node.outputs[0].name = f"{node.name}/output_0"
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, values: int | list[int]) -> ir.Value:
        return register(self._graph, ir.tensor(np.array(values, np.int64), name=f"{self._constants}.{name}"))
