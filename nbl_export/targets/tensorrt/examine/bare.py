"""Runs a plan once and waits, without the runner: no captured graph, no kept shape, no buffer of an earlier step.

    plan ─► runtime ─► engine ─► one context, one profile ─► upload, bind, execute, wait, download

For acceptance. If the same plan gives other numbers in the runner, the runner is at fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.targets.tensorrt.contexts import Strategy, make_config
from nbl_export.targets.tensorrt.device import Device
from nbl_export.targets.tensorrt.examine.elements import empty, narrowed, widened
from nbl_export.targets.tensorrt.library import Library
from nbl_export.targets.tensorrt.log import messages_of, require

__all__ = ["BarePlan", "Output", "sum_plan"]

_PLAIN = Strategy(graphs=False)


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

    def __init__(self, library: Library, trt: Any, device: Device, plan: bytes) -> None:
        self._library, self._trt, self._device, self._messages = library, trt, device, messages_of(trt)
        with self._messages.explaining("the library does not load the plan"):
            self._runtime = trt.Runtime(self._messages.logger)
            self._runtime.engine_host_code_allowed = False  # the default, made explicit
            self._engine = require(self._runtime.deserialize_cuda_engine(plan))

    def run(
        self, inputs: Mapping[str, tuple[np.ndarray, str]], outputs: Mapping[str, Output], profile: int = 0
    ) -> dict[str, np.ndarray]:
        """Run once; returns all outputs, widened to float32.

        Args:
            inputs: array and element type by name.

        Raises:
            NblError: the library refuses a profile, a shape, an address or the step; the GPU has no memory left.
        """
        device = self._device
        hosts = {name: narrowed(array, dtype) for name, (array, dtype) in inputs.items()}  # until the stream has read
        found = {name: empty(output.shape, output.dtype) for name, output in outputs.items()}
        places = {name: device.allocate(max(1, host.nbytes)) for name, host in hosts.items()}
        for name, output in outputs.items():
            places[name] = places[output.inside] if output.inside else device.allocate(found[name].nbytes)
        for name, host in hosts.items():
            device.upload(places[name], host)
        with self._messages.explaining("the library refuses to run the plan"):
            context = self._context(profile)
            device.synchronize()
            for name, host in hosts.items():
                require(context.set_input_shape(name, tuple(host.shape)), f"the shape {host.shape} of {name}")
            for name, address in places.items():
                require(context.set_tensor_address(name, address), f"the address of {name}")
            require(context.execute_async_v3(device.stream), "a step")
        for name, host in found.items():
            device.download(places[name], host)
        device.synchronize()
        return {name: widened(host, outputs[name].dtype) for name, host in found.items()}

    def _context(self, profile: int) -> Any:
        """A context on its profile, with working memory of its own; inside a block of `Messages.explaining`."""
        engine, device = self._engine, self._device
        runtime_config = make_config(self._library, self._trt, engine, _PLAIN, decode=False)
        context = require(engine.create_execution_context(runtime_config), "a context for the plan")
        if size := int(engine.device_memory_size_v2):
            context.set_device_memory(device.allocate(size), size)
        require(context.set_optimization_profile_async(profile, device.stream), f"profile {profile}")
        return context


def sum_plan(trt: Any) -> bytes:
    """A plan of y = x + x on four float32 numbers.

    Raises:
        NblError: the library builds nothing.
    """
    messages = messages_of(trt)
    with messages.explaining("the library builds no sum"):
        builder = trt.Builder(messages.logger)
        network = require(builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)))
        x = network.add_input("x", trt.float32, (1, 4))
        y = network.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0)
        y.name = "y"
        network.mark_output(y)
        return bytes(require(builder.build_serialized_network(network, builder.create_builder_config())))
