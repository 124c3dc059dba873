"""Makes nodes of int64 values: indices and lengths that a rewrite adds to a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from nbl_export.graph.emitter import new_node, register

__all__ = ["Integers"]


class Integers:
    """Makes int64 nodes, which are not in the graph yet, and constants, which are.

    Args:
        prefix, constants: begin the names of nodes and of constants.
    """

    def __init__(self, graph: ir.Graph, prefix: str, constants: str) -> None:
        self.nodes: list[ir.Node] = []
        self._graph, self._prefix, self._constants = graph, prefix, constants
        self._made: dict[str, ir.Value] = {}

    def __call__(self, op: str, name: str, *operands: ir.Value, **attributes: int) -> ir.Value:
        self.nodes.append(new_node(op, operands, f"{self._prefix}/{name}", ir.DataType.INT64, None, attributes))
        return self.nodes[-1].outputs[0]

    def constant(self, name: str, values: Any) -> ir.Value:
        """An initializer; the same name gives the same value."""
        if name not in self._made:
            tensor = ir.tensor(np.array(values, np.int64), name=f"{self._constants}.{name}")
            self._made[name] = register(self._graph, tensor)
        return self._made[name]
