"""What a mixer may put into an IR (`mixers.base.Builder`), and the states of layers with a short memory.

    x -- Multiply(valid) ------------- Concat -- mixer -- y
    ReadValue -- Gather(beam_idx) -------^  `- Slice(last rows) -- Assign          [B, tokens, D], zeros at first

OpenVINO GenAI knows such a state by its three dimensions, of which one is open. Rows of padding are set to zero. A
batch is padded on the left, so the last rows of a chunk are each row's last valid tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nbl_export.graph.names import constant_name, node_name, product_name, state_names
from nbl_export.mixers.base import StateSpec
from nbl_export.targets.openvino.rewrite.nodes import TOKENS, cut, integers, length, model_input, valid_tokens

__all__ = ["IrBuilder"]


class IrBuilder:
    """Makes the nodes of one layer.

    Args:
        x: the layer's input at the tap.
        remembers: whether the layer has a state; `self.x` is then zero at padding.
    """

    def __init__(self, model: Any, layer: int, x: Any, *, remembers: bool) -> None:
        from openvino import opset13

        self._ops, self._model, self._layer = opset13, model, layer
        self._variable: Any = None  # of the state
        self.x = self._masked(x) if remembers else x

    def matmul(self, x: Any, matrix: np.ndarray, name: str) -> Any:
        weight = self._constant(name, np.ascontiguousarray(matrix, np.float32))  # [outputs, inputs]
        return self._ops.matmul(x, weight, False, True, name=product_name(self._layer, name)).output(0)

    def add(self, x: Any, other: Any, name: str) -> Any:
        given = isinstance(other, np.ndarray)
        term = self._constant(name, other.astype(np.float32).reshape(1, 1, -1)) if given else other
        return self._ops.add(x, term, name=self._name("Add" if name == "bias" else f"Add{name.title()}")).output(0)

    def concat(self, values: Sequence[Any], name: str) -> Any:
        return self._ops.concat(list(values), TOKENS, name=self._name(f"Concat{name.title()}")).output(0)

    def slice(self, x: Any, start: int, end: int | None, name: str) -> Any:
        found = cut(x, start) if end is None else cut(x, start, end)
        found.set_friendly_name(self._name(f"Slice{name.title()}"))
        return found.output(0)

    def norm(self, x: Any, weight: np.ndarray, epsilon: float, name: str) -> Any:
        ops, number = self._ops, np.float32
        mean = ops.reduce_mean(ops.power(x, number(2)), integers([-1]), keep_dims=True)
        scaled = ops.multiply(x, ops.divide(number(1), ops.sqrt(ops.add(mean, number(epsilon)))))
        constant = self._constant(name, weight.astype(number).reshape(1, 1, -1))
        return ops.multiply(scaled, constant, name=self._name(name.title())).output(0)

    def state(self, spec: StateSpec, name: str) -> Any:
        from openvino import PartialShape, Type
        from openvino.op import read_value
        from openvino.op.util import Variable, VariableInfo

        info = VariableInfo()
        info.data_shape, info.data_type = PartialShape([-1, spec.tokens, spec.width]), Type.f32
        info.variable_id = next(iter(state_names(self._layer)))
        self._variable = Variable(info)
        self._model.add_variables([self._variable])
        batch, rows = length(model_input(self._model, "input_ids"), 0), integers([spec.tokens, spec.width])
        zeros = self._ops.broadcast(self._ops.constant(0.0, dtype=np.float32), self._ops.concat([batch, rows], 0))
        read = read_value(zeros, self._variable)
        read.set_friendly_name(self._name("Past"))
        beams = model_input(self._model, "beam_idx")
        if beams is None:
            return read.output(0)
        return self._ops.gather(read, beams, integers(0), name=self._name("Beams")).output(0)

    def keep(self, spec: StateSpec, value: Any, name: str) -> None:
        from openvino.op import assign

        self._model.add_sinks([assign(self.slice(value, -spec.tokens, None, "kept").get_node(), self._variable)])

    def _masked(self, x: Any) -> Any:
        """x with zeros in the rows of padding."""
        valid_BT = valid_tokens(self._model, self._layer, self._name("Valid"))
        rows = self._ops.unsqueeze(valid_BT, integers([-1]))
        return self._ops.multiply(x, rows, name=self._name("Masked")).output(0)

    def _constant(self, name: str, array: np.ndarray) -> Any:
        return self._ops.constant(array, name=constant_name(self._layer, name))

    def _name(self, title: str) -> str:
        return node_name(self._layer, title)
