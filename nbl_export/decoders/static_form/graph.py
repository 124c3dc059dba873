"""Reading and extending a graph, for the passes of the static form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError

__all__ = ["Emitter", "cache_slots", "drop_input", "graph_input", "need", "shape_of", "size", "type_of"]

Dim = int | str | ir.SymbolicDim | None


class Emitter:
    """Appends nodes to a graph.

    They go to its end whatever they feed: one topological sort after the last pass puts all in order, so that no
    pass needs to know where in the node list it stands.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph

    def __call__(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        name: str,
        dtype: ir.DataType | None = None,
        shape: Sequence[Dim] | None = None,
        **attributes: float | str | Sequence[int],
    ) -> ir.Value:
        """One node; node and output are called `name`."""
        node = ir.node(op_type, list(inputs), attributes, name=name)
        out = node.outputs[0]
        out.name = name
        if dtype is not None:
            out.dtype = dtype
        if shape is not None:
            out.shape = ir.Shape(shape)
        self._graph.append(node)
        return out

    def add(self, node: ir.Node) -> None:
        """A node that is made already."""
        self._graph.append(node)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An initializer; the same name gives the same value, so that passes share constants."""
        if name in self._graph.initializers:
            return self._graph.initializers[name]
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=ir.tensor(array, name=name),
        )
        self._graph.register_initializer(value)
        return value


def need(value: ir.Value | None, what: str) -> ir.Value:
    """The value, or a refusal that says what was expected."""
    if value is None:
        raise RefusalError(None, f"expected {what}")
    return value


def shape_of(value: ir.Value) -> list[int | ir.SymbolicDim]:
    """Dimensions that must be known, by number or by name."""
    if value.shape is None:
        raise RefusalError(None, f"{value.name} has no known shape")
    return list(value.shape)


def size(value: ir.Value, axis: int) -> int:
    """A dimension that must be a number."""
    dim = shape_of(value)[axis]
    if not isinstance(dim, int):
        raise RefusalError(None, f"dimension {axis} of {value.name} is {dim}; a number is needed")
    return dim


def type_of(value: ir.Value) -> ir.DataType:
    """An element type that must be known."""
    if value.dtype is None:
        raise RefusalError(None, f"{value.name} has no known element type")
    return value.dtype


def cache_slots(graph: ir.Graph) -> int:
    """S, from the first cache (after `HeadMajorCaches`)."""
    for value in graph.inputs:
        if (value.name or "").startswith("past_key_values."):
            return size(value, 2)
    raise RefusalError(None, "it has no cache inputs")


def graph_input(graph: ir.Graph, name: str) -> ir.Value:
    """The input of that name."""
    for value in graph.inputs:
        if value.name == name:
            return value
    raise RefusalError(None, f"it has no input {name}; it has {', '.join(str(v.name) for v in graph.inputs)}")


def drop_input(graph: ir.Graph, value: ir.Value) -> None:
    """Remove an input that nobody reads any more."""
    if readers := sorted({use.node.name or use.node.op_type for use in value.uses()}):
        raise RefusalError(None, f"input {value.name} is still read by {readers[0]}")
    graph.inputs.remove(value)
