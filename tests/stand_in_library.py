"""The library and the device of `stand_in`: graphs run on ONNX Runtime, time passes on a simulated stream.

A clock counts simulated seconds: work on the stream takes time, and only waiting for the stream lets the host see it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbl_export.targets.tensorrt.static.schedule import Profile

from .fake_tensorrt import (
    Config,
    Context,
    CudaGraphStrategy,
    DynamicShapesKernelSpecializationStrategy,
    ExecutionContextAllocationStrategy,
    FakeDevice,
    FakeTensorRT,
    FakeTensorRTX,
    RtxConfig,
    dtypes_of,
    open_graph,
)

if TYPE_CHECKING:
    from .stand_in import StandIn

__all__ = ["VERSION", "CountingDevice", "Engine", "Library", "SimulatedTimer"]

VERSION = "1.2.3"
_NVIDIA: dict[Any, str] = {np.float32: "FLOAT", np.float16: "HALF", np.int64: "INT64"}
_STEP_SECONDS, _COPY_SECONDS = 1e-3, 1e-5


# -- the device ------------------------------------------------------------------------------------------------


class CountingDevice(FakeDevice):
    """The host's memory, and simulated seconds of host and stream."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.host = self.stream_done = 0.0

    def work(self, seconds: float) -> None:
        self.host += 1e-6
        self.stream_done = max(self.stream_done, self.host) + seconds

    def upload(self, address: int, array: np.ndarray) -> None:
        self.work(_COPY_SECONDS)
        if self.fault != "memory":
            super().upload(address, array)

    def download(self, address: int, array: np.ndarray) -> None:
        self.work(_COPY_SECONDS)
        super().download(address, array)

    def synchronize(self) -> None:
        self.host = max(self.host, self.stream_done)

    def submit(self, work: Callable[[], None]) -> None:
        self.work(_STEP_SECONDS)
        super().submit(work)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        replay = super().capture(work)

        def timed() -> None:
            self.work(_STEP_SECONDS)
            replay()

        return timed


@dataclasses.dataclass
class SimulatedTimer:
    device: CountingDevice
    begun: float = 0.0

    def start(self) -> None:
        self.begun = max(self.device.stream_done, self.device.host)

    def stop(self) -> float:
        end = max(self.device.stream_done, self.device.host)
        self.device.synchronize()
        return end - self.begun


# -- the library -----------------------------------------------------------------------------------------------


class Library:
    """Stands in for the modules `tensorrt` and `tensorrt_rtx`."""

    __version__ = VERSION
    ILogger = FakeTensorRT.ILogger
    CudaGraphStrategy = CudaGraphStrategy
    DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    TensorIOMode = types.SimpleNamespace(INPUT="input", OUTPUT="output")
    TensorLocation = types.SimpleNamespace(DEVICE="device", HOST="host")
    LayerInformationFormat = types.SimpleNamespace(JSON="json")

    def __init__(self, parts: StandIn) -> None:
        self.parts = parts

    def Runtime(self, logger: Any) -> Any:
        def load(plan: bytes) -> Engine:
            return Engine(self.parts, logger, json.loads(plan))

        return types.SimpleNamespace(deserialize_cuda_engine=load, engine_host_code_allowed=True)


class Engine(FakeTensorRTX):
    """`ICudaEngine` of a plan. Either library's contexts have memory of the user."""

    def __init__(self, parts: StandIn, logger: Any, plan: dict[str, Any]) -> None:
        profiles = (Profile(p["name"], tuple(p["batch"]), tuple(p["tokens"])) for p in plan["profiles"])
        super().__init__(parts.opened, tuple(profiles))
        self.parts, self._logger = parts, logger
        self.graph = open_graph(Path(plan["graph"]))
        self.inputs = {a.name: a for a in self.graph.get_inputs()}
        self.dtypes = dtypes_of(self.graph)
        self.num_io_tensors = len(self.dtypes)

    def get_tensor_name(self, index: int) -> str:
        return list(self.dtypes)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_dtype(self, name: str) -> Any:
        return types.SimpleNamespace(name=_NVIDIA[self.dtypes[name]])

    def get_tensor_location(self, name: str) -> str:
        return "host" if self.parts.fault == "host input" and name == "write_indices" else "device"

    def is_shape_inference_io(self, _name: str) -> bool:
        return False

    def get_aliased_input_tensor(self, name: str) -> str:
        return name.replace("present.", "past_key_values.") if name.startswith("present.") else ""

    def create_runtime_config(self) -> Any:
        return RtxConfig(self) if self.parts.library.jit else Config()

    def context(self, config: Config) -> Context:
        return FaultyContext(self, config)

    def create_engine_inspector(self) -> Any:
        return types.SimpleNamespace(get_engine_information=lambda _format: json.dumps(self._layers()))

    def _layers(self) -> dict[str, Any]:
        shape = [1, *self.inputs[next(n for n in self.inputs if n.startswith("past"))].shape[1:]]
        cached = {"Name": "present.0.key", "LayerType": "KVCacheUpdate", "Outputs": [{"Dimensions": shape}]}
        fused = {"Name": "attention", "TacticName": "_gemm_mha_v2", "Outputs": [{"Dimensions": [1, 4, 1, 64]}]}
        scaled = {"Name": "scaled keys", "LayerType": "PWN(mul)", "Outputs": [{"Dimensions": shape}]}
        faulty = {"scaled keys": [cached, fused, scaled], "decomposed": ["scores", "softmax"], "no names": []}
        return {"Layers": faulty.get(self.parts.fault, [cached, fused])}


class FaultyContext(Context):
    """A context with one fault."""

    def __init__(self, engine: Engine, config: Config) -> None:
        super().__init__(engine, config)
        self.fault = engine.parts.fault

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if self.fault == "raises":
            self._trt.say("ERROR", "CUDA error 700: an illegal memory access was encountered")
            raise RuntimeError("Error in set optimization profile async.")
        return super().set_optimization_profile_async(index, stream)

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def execute_async_v3(self, stream: int) -> bool:
        if self.fault == "crash":
            os.abort()
        if self.fault == "refused":
            return self._trt.say("ERROR", "CUDA error 719: unspecified launch failure")
        return super().execute_async_v3(stream)

    def computed(self, name: str, value: np.ndarray, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        if self.fault == "sum" and name == "y":
            return value + 1
        if name != "logits":
            return value
        kinds = DynamicShapesKernelSpecializationStrategy
        kind = getattr(self.config, "dynamic_shapes_kernel_specialization_strategy", None)
        late = self._trt.profiles[self.profile].tokens[1] == 1 and int(feeds["write_indices"].max()) > 70
        if (self.fault == "lazy kernels" and kind is kinds.LAZY) or (self.fault == "late decode" and late):
            return value[..., ::-1]
        return value
