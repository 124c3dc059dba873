"""Reads and extends a graph, for graph passes, and runs them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.names import constant_name, node_name, product_name

__all__ = [
    "LayerMaker",
    "Maker",
    "ancestors",
    "choose",
    "dependent_nodes",
    "drop_input",
    "element_type",
    "graph_input",
    "need",
    "register",
    "run_passes",
    "shape_of",
    "size",
    "type_of",
    "values_read",
]


Dim = int | str | ir.SymbolicDim | None


class Maker:
    """Makes nodes and constants; the nodes are in `nodes`, in order, and not in a graph yet.

    Args:
        graph: gets the constants.
        prefix: begins names of nodes. constants: begins names of constants.
        dtype: of outputs and constants, if a call states no other; None leaves it open.
        output: ends names of outputs; {} is the number of an output.
    """

    def __init__(
        self,
        graph: ir.Graph,
        prefix: str = "",
        dtype: ir.DataType | None = None,
        constants: str = "",
        output: str = "/output_{}",
    ) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []
        self._prefix = prefix
        self.dtype = dtype
        self._constants = constants
        self._output = output
        self._made: dict[str, ir.Value] = {}

    def constant(self, name: str, values: npt.ArrayLike, dtype: ir.DataType | None = None) -> ir.Value:
        """An initializer; the same name gives the same value.

        Raises:
            RefusalError: the graph had an initializer of this name before.
        """
        if name not in self._made:
            kind = dtype or self.dtype
            array = np.asarray(values, None if kind is None else kind.numpy())
            self._made[name] = register(self.graph, ir.tensor(array, name=f"{self._constants}{name}"))
        return self._made[name]

    def __call__(self, op_type: str, name: str, *inputs: ir.Value | None, **settings: Any) -> ir.Value:
        """The output of a new node; settings are those of `several`."""
        return self.several(1, op_type, name, *inputs, **settings)[0]

    def several(
        self,
        outputs: int,
        op_type: str,
        name: str,
        *inputs: ir.Value | None,
        dtype: ir.DataType | None = None,
        shape: Iterable[Dim] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """The outputs of a new node, all of one type and shape."""
        name = f"{self._prefix}{name}"
        dims = None if shape is None else ir.Shape(shape)
        made = [ir.val(f"{name}{self._output.format(n)}", dtype or self.dtype, dims) for n in range(outputs)]
        self.nodes.append(ir.node(op_type, inputs, attributes, domain=domain, outputs=made, name=name))
        return made


class LayerMaker(Maker):
    """Makes what is added at one layer: products and sums of rows."""

    def __init__(self, graph: ir.Graph, layer: int, dtype: ir.DataType | None) -> None:
        super().__init__(graph, node_name(layer, ""), dtype, constant_name(layer, ""))
        self._layer = layer

    def matmul(self, x: ir.Value, matrix: np.ndarray, name: str) -> ir.Value:
        """x M' for a matrix [O, I]."""
        transposed = self.constant(name, np.ascontiguousarray(matrix.T))  # as MatMul takes it
        shape = None if x.shape is None else [*x.shape[:-1], len(matrix)]
        title = product_name(self._layer, name).removeprefix(self._prefix)
        return self("MatMul", title, x, transposed, shape=shape)

    def add(self, x: ir.Value, vector: np.ndarray, name: str) -> ir.Value:
        """The sum of a value and a vector."""
        return self("Add", "Add", x, self.constant(name, vector), shape=x.shape)


def choose(condition: ir.Value, then: ir.Graph, other: ir.Graph, name: str) -> ir.Node:
    """A node that runs one of two graphs, which may read values of the graph around them."""
    outputs = [ir.Value(name=f"{name}/output_{n}", type=inner.type) for n, inner in enumerate(then.outputs)]
    return ir.node("If", [condition], {"then_branch": then, "else_branch": other}, outputs=outputs, name=name)


def values_read(node: ir.Node) -> Iterator[ir.Value]:
    """Values that a node reads, also those that graphs inside it take from the graph around them."""
    yield from (value for value in node.inputs if value is not None)
    for inner in (a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH):
        yield from (value for user in inner for value in values_read(user) if value.graph is not inner)


def dependent_nodes(graph: ir.Graph, values: Iterable[ir.Value]) -> Iterator[ir.Node]:
    """Nodes that are computed from some of the values, in the order of the graph."""
    reached = set(values)
    for node in graph:
        if any(value in reached for value in values_read(node)):
            reached.update(node.outputs)
            yield node


def ancestors(value: ir.Value, stop: Collection[ir.Value], without: Collection[str] = ()) -> dict[ir.Value, None]:
    """The value and all values that it is computed from; the search ends at `stop`.

    Args:
        without: operators whose inputs do not count.
    """
    found: dict[ir.Value, None] = {}
    waiting = [value]
    while waiting:
        here = waiting.pop()
        if here in found:
            continue
        found[here] = None
        producer = here.producer()
        ends = here in stop and here is not value
        if not ends and producer is not None and producer.op_type not in without:
            waiting.extend(values_read(producer))
    return found


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


def register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Register a tensor as a new constant, whose name, shape and type are those of the tensor.

    Every constant that this package adds comes from here, so what a graph declares is what it stores.

    Raises:
        RefusalError: an initializer of this name exists.
    """
    if tensor.name in graph.initializers:
        raise RefusalError(None, f"it already has an initializer {tensor.name}; this graph has been rewritten before")
    return ir.tape.Tape(graph).initializer(tensor)


_DEPTH = 12  # most operators between a value and a value of a stated type


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
