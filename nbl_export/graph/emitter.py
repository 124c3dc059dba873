"""Reads and extends a graph, for graph passes, and runs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError

__all__ = [
    "Emitter",
    "Maker",
    "add_initializer",
    "cache_slots",
    "choose",
    "drop_input",
    "element_type",
    "graph_input",
    "need",
    "new_node",
    "register",
    "run_passes",
    "shape_of",
    "size",
    "type_of",
    "values_read",
]


Dim = int | str | ir.SymbolicDim | None


class Emitter:
    """Appends nodes to a graph.

    Nodes go to the end of the node list. One topological sort after the last pass orders all nodes, so no pass needs a
    position in the list.
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
        """Append one node; the node and its output are named `name`."""
        node = new_node(op_type, inputs, name, dtype, None if shape is None else ir.Shape(shape), attributes)
        node.outputs[0].name = name
        self._graph.append(node)
        return node.outputs[0]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An initializer; the same name returns the same value, so passes share constants."""
        if name in self._graph.initializers:
            return self._graph.initializers[name]
        return register(self._graph, ir.tensor(array, name=name))


class Maker:
    """Makes nodes whose names begin with a prefix; they are in `nodes`, and not in a graph yet.

    Args:
        dtype: of outputs and constants, where a call does not state another.
        graph: that gets the constants. constants: begins their names.
    """

    def __init__(self, prefix: str, dtype: ir.DataType, graph: ir.Graph | None = None, constants: str = "") -> None:
        self.nodes: list[ir.Node] = []
        self._prefix = prefix
        self._dtype = dtype
        self._graph = graph
        self._constants = constants
        self._made: dict[str, ir.Value] = {}

    def constant(self, name: str, values: Any, kind: ir.DataType | None = None) -> ir.Value:
        """An initializer; the same name gives the same value.

        Raises:
            RefusalError: the graph had an initializer of this name before.
        """
        assert self._graph is not None
        if name not in self._made:
            dtype = kind or self._dtype
            self._made[name] = add_initializer(self._graph, f"{self._constants}.{name}", np.asarray(values), dtype)
        return self._made[name]

    def __call__(
        self,
        op_type: str,
        name: str,
        *inputs: ir.Value | None,
        kind: ir.DataType | None = None,
        outputs: int = 1,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """The output of a new node; several if `outputs` is not 1."""
        name = f"{self._prefix}{name}"
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for number, value in enumerate(node.outputs):
            value.name = f"{name}/output_{number}"
            value.type = ir.TensorType(kind or self._dtype)
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs


def choose(
    condition: ir.Value, then: ir.Graph, other: ir.Graph, name: str, given: Mapping[int, ir.Value] | None = None
) -> ir.Node:
    """A node that runs one of two graphs, which may read values of the graph around them.

    Args:
        given: values that become its outputs, by place; the others are made.
    """
    made = [ir.Value(name=f"{name}/output_{n}", type=inner.type) for n, inner in enumerate(then.outputs)]
    outputs = [(given or {}).get(n, value) for n, value in enumerate(made)]
    branches = {"then_branch": then, "else_branch": other}
    return ir.node("If", [condition], branches, outputs=outputs, name=name)


def values_read(node: ir.Node) -> Iterator[ir.Value]:
    """Values that a node reads, also those that graphs inside it take from the graph around them."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type != ir.AttributeType.GRAPH:
            continue
        inner = attribute.as_graph()
        made = {value for user in inner for value in user.outputs} | {*inner.inputs, *inner.initializers.values()}
        yield from (value for user in inner for value in values_read(user) if value not in made)


def new_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    dtype: ir.DataType | None = None,
    shape: ir.Shape | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> ir.Node:
    """A node that is not in a graph yet; its output is named NAME/output_0."""
    kind = None if dtype is None else ir.TensorType(dtype)
    output = ir.Value(name=f"{name}/output_0", shape=shape, type=kind)
    return ir.node(op_type, inputs, attributes, outputs=[output], name=name)


def need(value: ir.Value | None, what: str) -> ir.Value:
    """The value, or a refusal that names the expected `what`."""
    if value is None:
        raise RefusalError(None, f"expected {what}")
    return value


def shape_of(value: ir.Value) -> list[int | ir.SymbolicDim]:
    """All dimensions, as numbers or symbols; refuses an unknown shape."""
    if value.shape is None:
        raise RefusalError(None, f"{value.name} has no known shape")
    return list(value.shape)


def size(value: ir.Value, axis: int) -> int:
    """One dimension as a number; refuses a symbol."""
    dim = shape_of(value)[axis]
    if not isinstance(dim, int):
        raise RefusalError(None, f"dimension {axis} of {value.name} is {dim}; a number is needed")
    return dim


def type_of(value: ir.Value) -> ir.DataType:
    """The element type; refuses an unknown type."""
    if value.dtype is None:
        raise RefusalError(None, f"{value.name} has no known element type")
    return value.dtype


def cache_slots(graph: ir.Graph) -> int:
    """Slots S of the first cache; run after `HeadMajorCaches`."""
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
    """Remove an input; refuses if a node still reads it."""
    if readers := sorted({use.node.name or use.node.op_type for use in value.uses()}):
        raise RefusalError(None, f"input {value.name} is still read by {readers[0]}")
    graph.inputs.remove(value)


_DEPTH = 12  # most operators between a value and a value of a stated type


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
    """Register a new constant.

    Raises:
        RefusalError: an initializer of this name exists.
    """
    return register(graph, ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=name))


def register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Register a tensor as a new constant, whose name, shape and type are those of the tensor.

    Every constant that this package adds comes from here, so what a graph declares is what it stores.

    Raises:
        RefusalError: an initializer of this name exists.
    """
    if tensor.name in graph.initializers:
        raise RefusalError(None, f"it already has an initializer {tensor.name}; this graph has been rewritten before")
    shape = ir.Shape(tensor.shape.numpy())
    dtype = ir.TensorType(tensor.dtype)
    value = ir.Value(name=tensor.name, const_value=tensor, shape=shape, type=dtype)
    graph.register_initializer(value)
    return value


def element_type(graph: ir.Graph, value: ir.Value) -> ir.DataType:
    """Float type of a hidden value: as stated, else derived from its inputs, else the type of the logits."""
    return _derived_type(value, _DEPTH) or graph.outputs[0].dtype or ir.DataType.FLOAT


def _derived_type(value: ir.Value, depth: int) -> ir.DataType | None:
    if value.dtype is not None:
        return value.dtype if value.dtype.is_floating_point() else None
    node = value.producer()
    if node is None or depth == 0:
        return None
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    types = (_derived_type(v, depth - 1) for v in node.inputs if v is not None)
    return next((t for t in types if t is not None), None)


def run_passes(passes: Sequence[ir.passes.PassBase], model: ir.Model) -> None:
    """Run passes in order.

    Raises:
        RefusalError: a pass refuses the graph; the error is the pass's own.
    """
    try:
        ir.passes.Sequential(*passes)(model)
    except ir.passes.PassError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, RefusalError):
            cause = cause.__cause__
        raise cause or error from None
