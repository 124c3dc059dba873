"""The decoder of `reference` on an original IR.

    IR with the stream at the exit layer as a further output          runs
    keys, values [1, T, K] ── the IR's own nodes ── new rows of the states     of all layers with maps

The second model is what the IR has between the products of a layer and its states: heads and rotary embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.graph.ir.anatomy import Dataflow
from nbl_export.graph.ir.files import read_ir
from nbl_export.graph.ir.session import IrDecoder
from nbl_export.methods.predicted_kv.maps import PredictedKV, exit_of
from nbl_export.methods.predicted_kv.reference import KeysValues, PredictedKVDecoder

__all__ = ["ir_reference"]

_STREAM = "nbl.stream"


def ir_reference(
    directory: Path, file: str, maps: Mapping[int, PredictedKV], *, exact: bool = False
) -> PredictedKVDecoder:
    """The decoder of an IR, as `Method.ir_reference` has it."""
    decoder = _Shown(directory, file, exit_of(maps).exit_layer, exact=exact)
    return PredictedKVDecoder(decoder, _STREAM, maps, _Rows(directory, file, list(maps)))


class _Shown(IrDecoder):
    """An IR that gives the stream at a layer too."""

    def __init__(self, directory: Path, file: str, layer: int, *, exact: bool) -> None:
        self._layer = layer
        super().__init__(directory, file, exact=exact)

    def parts(self, model: Any) -> list[Any]:
        from openvino import opset13 as ops

        stream = Dataflow(model).block(self._layer).residual
        stream.get_tensor().add_names({_STREAM})
        model.add_results([ops.result(stream)])
        return [model]

    def run(self, ids_1T: np.ndarray, valid_1T: np.ndarray | None = None) -> Any:
        """All outputs of one step of a single sequence by name; logits alone if it is a step of `step`."""
        if valid_1T is not None:
            return super().run(ids_1T, valid_1T)
        return self.outputs(ids_1T, np.ones_like(ids_1T))

    @property
    def length(self) -> int:
        return self.cache_length


class _Rows:
    """Fills the states of layers."""

    def __init__(self, directory: Path, file: str, layers: list[int]) -> None:
        import openvino
        from openvino import opset13 as ops

        model = read_ir(directory, file)
        flow = Dataflow(model)
        self._states = {}
        given = []
        results = []
        for layer in layers:
            heads = flow.heads(flow.block(layer))
            self._states[layer] = tuple(state.variable for state in flow.states[layer])
            for port, state in zip((heads.keys, heads.values), flow.states[layer], strict=True):
                parameter = ops.parameter(port.get_partial_shape(), np.float32, name=state.variable)
                port.replace_source_output(parameter.output(0))
                given.append(parameter)
                results.append(ops.result(state.new))
        positions = model.input("position_ids").get_node()
        rows = openvino.Model(results, [positions, *given], "rows")
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        self._compiled = openvino.Core().compile_model(rows, "CPU", exact)

    def __call__(self, decoder: IrDecoder, given: Mapping[int, KeysValues], place: int) -> None:
        tokens = next(iter(given.values()))[0].shape[1]
        positions = np.arange(place, place + tokens, dtype=np.int64)[None]
        made = self._compiled([positions, *(rows for pair in given.values() for rows in pair)])
        states = decoder.states()
        for names, keys, values in zip(
            self._states.values(), *(list(made.values())[k::2] for k in (0, 1)), strict=True
        ):
            for name, rows in zip(names, (keys, values), strict=True):
                states[name][:, :, place + 1 : place + tokens] = rows[:, :, 1:]
        decoder.put_states(states, decoder.mask_BK)
