"""Parts of an IR between which mixers take the place of attention, as `methods.mixed_session` splits an ONNX graph.

    input_ids ─► part 0 ─► x, tap of layer i  ...  x, output of i's mixer ─► part 1 ─► ... ─► logits
                 states of layers below i                                    states of layers from i to j

Values between parts are called nbl.stream.i (x), nbl.tap.i and nbl.mixed.i (the output of the mixer).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.graph.ir.anatomy import Dataflow
from nbl_export.graph.ir.files import copy_options
from nbl_export.graph.ir.session import IrDecoder
from nbl_export.methods.base import tapped
from nbl_export.methods.linear.maps import Linear

__all__ = ["MixedIr", "parts_of"]


class MixedIr(IrDecoder):
    """The original IR with mixers in place of attention, computed without the rewrite.

    Args:
        mixers: layer -> its mixer. tap: what they read.
    """

    def __init__(self, directory: Path, file: str, mixers: Mapping[int, Linear], tap: str, *, exact: bool) -> None:
        self._mixers = dict(sorted(mixers.items()))
        self._tap = tap
        super().__init__(directory, file, exact=exact)

    def parts(self, model: Any) -> list[Any]:
        return parts_of(model, list(self._mixers), self._tap)

    def between(self, place: int, known: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if not place:
            return {}
        layer = list(self._mixers)[place - 1]
        return {f"nbl.mixed.{layer}": self._mixers[layer](known[f"nbl.tap.{layer}"])}


def parts_of(model: Any, layers: Sequence[int], tap: str) -> list[Any]:
    """The part before the join of the first layer, and the part behind each join; the model does not change.

    Raises:
        RefusalError: a layer is not understood, or has no such tap.
    """
    bounds = [None, *sorted(layers), None]
    return [_part(model.clone(), low, high, tap) for low, high in itertools.pairwise(bounds)]


def _part(model: Any, low: int | None, high: int | None, tap: str) -> Any:
    """From the join of layer `low` to that of `high`; None is the beginning, or the end."""
    import openvino
    from openvino import opset13 as ops

    flow = Dataflow(model)
    results = list(model.get_results())
    if high is not None:
        block = flow.block(high)
        results = [_result(block.residual, f"nbl.stream.{high}"), _result(tapped(block, tap), f"nbl.tap.{high}")]
    given = []
    if low is not None:
        block = flow.block(low)
        for place, kind in ((1 - block.branch, "stream"), (block.branch, "mixed")):
            value = block.join.input_value(place)
            parameter = ops.parameter([-1, -1, -1], value.get_element_type(), name=f"nbl.{kind}.{low}")
            parameter.output(0).get_tensor().set_names({parameter.get_friendly_name()})
            block.join.input(place).replace_source_output(parameter.output(0))
            given.append(parameter)
    within = [i for i in flow.states if (-math.inf if low is None else low) < i < (math.inf if high is None else high)]
    sinks = [state.assign for layer in within for state in flow.states[layer]]
    parameters = [node for node in _above([*results, *sinks]) if node.get_type_name() == "Parameter"]
    part = openvino.Model(results, sinks, parameters, f"{model.get_name()}.{low}")
    copy_options(model, part)
    return part


def _result(value: Any, name: str) -> Any:
    from openvino import opset13 as ops

    result = ops.result(value)
    value.get_tensor().add_names({name})
    return result


def _above(nodes: Sequence[Any]) -> list[Any]:
    """The nodes and all that they depend on."""
    found: dict[str, Any] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node.get_name() not in found:
            found[node.get_name()] = node
            waiting.extend(value.get_node() for value in node.input_values())
    return list(found.values())
