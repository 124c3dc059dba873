"""Runs a plan once and waits, without the runner: no captured graph, no kept shape, no buffer of an earlier step.

    plan ─► runtime ─► engine ─► one context, one profile ─► upload, bind, execute, wait, download

For acceptance. If the same plan gives other numbers in the runner, the runner is at fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.engines.tensorrt.device import Device
from nbl_export.engines.tensorrt.examine.elements import empty, narrowed, widened
from nbl_export.engines.tensorrt.log import complaints, messages_of
from nbl_export.errors import NblError

__all__ = ["BarePlan", "Output", "sum_plan"]


@dataclass(frozen=True)
class Output:
    """An output of a plan.

    Attributes:
        inside: the input whose memory it shares; "" if it has memory of its own.
    """

    shape: tuple[int, ...]
    dtype: str
    inside: str = ""


class BarePlan:
    """A plan on a device.

    Args:
        trt: the imported library.
        device: owns all memory.

    Raises:
        NblError: the library does not load the plan.
    """

    def __init__(self, trt: Any, device: Device, plan: bytes) -> None:
        self._trt, self._device = trt, device
        messages = messages_of(trt)
        with messages.collected() as said:
            self._runtime = trt.Runtime(messages.logger)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise NblError(f"the library does not load the plan: {(complaints(said) or ['it gives no reason'])[0]}")

    def run(
        self, inputs: Mapping[str, tuple[np.ndarray, str]], outputs: Mapping[str, Output], profile: int = 0
    ) -> dict[str, np.ndarray]:
        """Run once; returns all outputs, widened to float32.

        Args:
            inputs: array and element type by name.

        Raises:
            NblError: the library refuses a profile, a shape, an address or the step.
        """
        device = self._device
        context = self._engine.create_execution_context()
        if context is None:
            raise NblError("the library makes no execution context: the GPU has no memory left")
        _demand(context.set_optimization_profile_async(profile, device.stream), f"profile {profile}")
        device.synchronize()
        kept, places = [], {}
        for name, (array, dtype) in inputs.items():
            host = narrowed(array, dtype)
            kept.append(host)  # until the stream has read it
            places[name] = device.allocate(max(1, host.nbytes))
            device.upload(places[name], host)
            _demand(context.set_input_shape(name, tuple(host.shape)), f"the shape {host.shape} of {name}")
            _demand(context.set_tensor_address(name, places[name]), f"the address of {name}")
        found = {name: empty(output.shape, output.dtype) for name, output in outputs.items()}
        for name, output in outputs.items():
            places[name] = places[output.inside] if output.inside else device.allocate(found[name].nbytes)
            _demand(context.set_tensor_address(name, places[name]), f"the address of {name}")
        _demand(context.execute_async_v3(device.stream), "a step")
        for name, host in found.items():
            device.download(places[name], host)
        device.synchronize()
        del kept
        return {name: widened(host, outputs[name].dtype) for name, host in found.items()}


def _demand(answer: object, what: str) -> None:
    if answer is False:
        raise NblError(f"the library refuses {what}")


def sum_plan(trt: Any) -> bytes:
    """A plan of y = x + x on four float32 numbers.

    Raises:
        NblError: the library builds nothing.
    """
    messages = messages_of(trt)
    with messages.collected() as said:
        builder = trt.Builder(messages.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        x = network.add_input("x", trt.float32, (1, 4))
        y = network.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0)
        y.name = "y"
        network.mark_output(y)
        plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise NblError(f"{trt.__name__} builds no sum: {(complaints(said) or ['it gives no reason'])[0]}")
    return bytes(plan)
