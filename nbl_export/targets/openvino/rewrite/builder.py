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

from nbl_export.errors import RefusalError
from nbl_export.graph.names import constant_name, node_name, product_name, state_names
from nbl_export.mixers.base import StateSpec, WindowShape

__all__ = ["IrBuilder"]

_NO_WINDOW = "an IR holds no layer of kind window yet; ONNX decoders do"
_TOKENS = 1  # axis of the tokens, in [batch, tokens, hidden size]


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
        return self._ops.concat(list(values), _TOKENS, name=self._name(f"Concat{name.title()}")).output(0)

    def slice(self, x: Any, start: int, end: int | None, name: str) -> Any:
        stop = np.iinfo(np.int64).max if end is None else end
        bounds = [self._integers([at]) for at in (start, stop, 1, _TOKENS)]
        return self._ops.slice(x, *bounds, name=self._name(f"Slice{name.title()}")).output(0)

    def norm(self, x: Any, weight: np.ndarray, epsilon: float, name: str) -> Any:
        raise RefusalError(self._layer, _NO_WINDOW)

    def window(self, qkv: Any, shape: WindowShape, frequencies: np.ndarray, spec: StateSpec, name: str) -> Any:
        raise RefusalError(self._layer, _NO_WINDOW)

    def state(self, spec: StateSpec, name: str) -> Any:
        from openvino import PartialShape, Type
        from openvino.op import read_value
        from openvino.op.util import Variable, VariableInfo

        info = VariableInfo()
        info.data_shape, info.data_type = PartialShape([-1, spec.tokens, spec.width]), Type.f32
        info.variable_id = next(iter(state_names(self._layer)))
        self._variable = Variable(info)
        self._model.add_variables([self._variable])
        batch, rows = self._length(self._input("input_ids"), 0), self._integers([spec.tokens, spec.width])
        zeros = self._ops.broadcast(self._ops.constant(0.0, dtype=np.float32), self._ops.concat([batch, rows], 0))
        read = read_value(zeros, self._variable)
        read.set_friendly_name(self._name("Past"))
        beams = self._input("beam_idx")
        if beams is None:
            return read.output(0)
        return self._ops.gather(read, beams, self._integers(0), name=self._name("Beams")).output(0)

    def keep(self, spec: StateSpec, value: Any, name: str) -> None:
        from openvino.op import assign

        rows = self.slice(value, -spec.tokens, None, "kept").get_node()
        self._model.add_sinks([assign(rows, self._variable)])

    def _masked(self, x: Any) -> Any:
        """x with zeros in the rows of padding."""
        mask, ids = self._input("attention_mask"), self._input("input_ids")
        if mask is None or ids is None:
            raise RefusalError(self._layer, "it has no attention_mask, which a layer with a state needs")
        start = self._ops.negative(self._length(ids, 1))
        end, step, axis = (self._integers([at]) for at in (np.iinfo(np.int64).max, 1, _TOKENS))
        chunk = self._ops.convert(self._ops.slice(mask, start, end, step, axis), "f32")
        rows = self._ops.unsqueeze(chunk, self._integers([-1]))
        return self._ops.multiply(x, rows, name=self._name("Masked")).output(0)

    def _length(self, value: Any, axis: int) -> Any:
        """One dimension [1] of a value."""
        return self._ops.gather(self._ops.shape_of(value), self._integers([axis]), self._integers(0))

    def _input(self, name: str) -> Any | None:
        return next((p for p in self._model.inputs if name in p.get_names()), None)

    def _integers(self, values: int | list[int]) -> Any:
        return self._ops.constant(values, dtype=np.int64)

    def _constant(self, name: str, array: np.ndarray) -> Any:
        return self._ops.constant(array, name=constant_name(self._layer, name))

    def _name(self, title: str) -> str:
        return node_name(self._layer, title)
