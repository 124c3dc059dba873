"""The `mixers.base.Builder` of ONNX graphs. A layer with a short memory has states:

    before   x --------- mixer -- y          after   x -- Mul(valid) --------- Concat -- mixer -- y
                                                     past (transposed) ---------^   `- GatherND -- present (transposed)

    past_key_values.N.conv_state [B, D, tokens]      ->  present.N.conv_state            the remembered rows
    past_key_values.N.recurrent_state [B, 1, 1, 1]   ->  present.N.recurrent_state       nothing; GenAI expects a pair

ONNX Runtime GenAI runs such states in any decoder, without a key in its settings. Rows of padding are set to zero, and
the state is taken behind each row's last valid token. So a batch may be padded on either side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.emitter import add_initializer, new_node, register
from nbl_export.graph.names import constant_name, node_name, product_name, state_names
from nbl_export.mixers.base import StateSpec
from nbl_export.rewrite.tail import LastValid

__all__ = ["GraphBuilder", "ValidTokens"]

_PREFIX, _CONSTANTS = "/nbl/states", "nbl.states"


class ValidTokens:
    """Which tokens of a chunk are no padding, for all layers with a state; puts its nodes in front of the graph.

    Raises:
        RefusalError: the graph has no mask of the tokens.
    """

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        if not any(v.name == "attention_mask" for v in graph.inputs):
            raise RefusalError(None, "it has no attention_mask, which a layer with a state needs")
        self._graph, self._rows = graph, {}  # type: ir.Graph, dict[int, ir.Value]
        self._last = LastValid(graph, _PREFIX, _CONSTANTS)
        cast = new_node("Cast", [self._last.chunk], f"{_PREFIX}/float", dtype, None, {"to": int(dtype)})
        axis = register(graph, ir.tensor(np.array([-1], np.int64), name=f"{_CONSTANTS}.rows"))
        widened = new_node("Unsqueeze", [cast.outputs[0], axis], f"{_PREFIX}/rows", dtype)
        graph.insert_before(graph[0], [*self._last.index, cast, widened])
        self._behind = widened
        self.mask_BT1 = widened.outputs[0]

    def last_rows(self, tokens: int) -> ir.Value:
        """Indices [B, tokens, 1] of the last rows of a value [B, tokens + T, D], up to each row's last valid token."""
        if tokens not in self._rows:
            steps = np.arange(1, tokens + 1, dtype=np.int64).reshape(1, -1, 1)
            constant = register(self._graph, ir.tensor(steps, name=f"{_CONSTANTS}.last_{tokens}"))
            kind = ir.DataType.INT64
            node = new_node("Add", [self._last.at, constant], f"{_PREFIX}/last_{tokens}", kind)
            self._graph.insert_after(self._behind, [node])
            self._rows[tokens] = node.outputs[0]
        return self._rows[tokens]


class GraphBuilder:
    """Makes the nodes of one layer; they are in `nodes`, in order, and not in the graph yet.

    Args:
        shape: of the layer's input.
        valid: needed by a layer with a state alone.
    """

    def __init__(
        self, graph: ir.Graph, layer: int, dtype: ir.DataType, shape: ir.Shape | None, valid: ValidTokens | None = None
    ) -> None:
        self.nodes: list[ir.Node] = []
        self._graph, self._layer, self._dtype, self._valid, self._shape = graph, layer, dtype, valid, shape

    def masked(self, x: ir.Value) -> ir.Value:
        """x with zeros in rows of padding."""
        assert self._valid is not None
        return self._add_node("Mul", [x, self._valid.mask_BT1], "Masked", x.shape)

    def matmul(self, x: ir.Value, matrix: np.ndarray, name: str) -> ir.Value:
        transposed = np.ascontiguousarray(matrix.T)  # as MatMul takes it
        title = product_name(self._layer, name).rpartition("/")[2]
        shape = None if self._shape is None else ir.Shape([*self._shape[:-1], matrix.shape[0]])
        return self._add_node("MatMul", [x, self._constant(name, transposed)], title, shape)

    def add(self, x: ir.Value, other: ir.Value | np.ndarray, name: str) -> ir.Value:
        term = self._constant(name, other) if isinstance(other, np.ndarray) else other
        return self._add_node("Add", [x, term], "Add" if name == "bias" else f"Add{name.title()}", x.shape)

    def concat(self, values: Sequence[ir.Value], name: str) -> ir.Value:
        return self._add_node("Concat", list(values), f"Concat{name.title()}", None, axis=1)

    def slice(self, x: ir.Value, start: int, end: int | None, name: str) -> ir.Value:
        stop = np.iinfo(np.int64).max if end is None else end
        bounds = [self._integers(f"{name}.{part}", [at]) for part, at in (("start", start), ("end", stop), ("axis", 1))]
        return self._add_node("Slice", [x, *bounds], f"Slice{name.title()}", None)

    def norm(self, x: ir.Value, weight: np.ndarray, epsilon: float, name: str) -> ir.Value:
        inputs, attributes = [x, self._constant(name, weight)], {"axis": -1, "stash_type": 1, "epsilon": epsilon}
        return self._add_node("SimplifiedLayerNormalization", inputs, name.title(), x.shape, **attributes)

    def state(self, spec: StateSpec, name: str) -> ir.Value:
        (past, _), _ = self._states(spec)
        return self._add_node("Transpose", [past], "Past", None, perm=[0, 2, 1])

    def keep(self, spec: StateSpec, value: ir.Value, name: str) -> None:
        assert self._valid is not None
        (past, empty), (present, unchanged) = self._states(spec)
        rows = self._add_node("GatherND", [value, self._valid.last_rows(spec.tokens)], "Kept", None, batch_dims=1)
        self._fill("Transpose", [rows], present, past, {"perm": [0, 2, 1]})
        self._fill("Identity", [empty], unchanged, empty, {})

    def _fill(
        self, op: str, inputs: list[ir.Value], taken: ir.Value, given: ir.Value, attributes: Mapping[str, Any]
    ) -> None:
        """A node that gives an output of the graph, of the type and shape of an input."""
        node = ir.node(op, inputs, attributes, outputs=[taken], name=node_name(self._layer, f"{op}Present"))
        taken.type, taken.shape = given.type, given.shape
        self.nodes.append(node)

    def _states(self, spec: StateSpec) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        """Inputs and outputs of the layer's states; made at the first call."""
        names = state_names(self._layer)
        found = [v for v in self._graph.inputs if v.name in names]
        if not found:
            batch = self._graph.inputs[0].shape
            first = "batch_size" if batch is None else batch[0]
            for past, own in zip(names, ((spec.width, spec.tokens), (1, 1, 1)), strict=True):
                kind = ir.TensorType(self._dtype)
                self._graph.inputs.append(ir.Value(name=past, shape=ir.Shape([first, *own]), type=kind))
                self._graph.outputs.append(ir.Value(name=names[past]))
            found = list(self._graph.inputs)[-2:]
        return found, [v for v in self._graph.outputs if v.name in names.values()]

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        return add_initializer(self._graph, constant_name(self._layer, name), array, self._dtype)

    def _integers(self, name: str, values: list[int]) -> ir.Value:
        tensor = ir.tensor(np.array(values, np.int64), name=constant_name(self._layer, name))
        return register(self._graph, tensor)

    def _add_node(
        self, op: str, inputs: list[ir.Value], title: str, shape: ir.Shape | None, **attributes: float | list[int]
    ) -> ir.Value:
        node = new_node(op, inputs, node_name(self._layer, title), self._dtype, shape, attributes)
        self.nodes.append(node)
        return node.outputs[0]
