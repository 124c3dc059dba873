"""A TensorRT whose contexts run the graph on ONNX Runtime, and a GPU whose memory is the host's.

The plan is the path of a graph. As on a GPU, tensors are addresses, work goes onto a stream, a captured step is
replayed with the shapes it was captured with. What TensorRT refuses is answered as its bindings answer: False, None
or RuntimeError.

Logits are ONNX Runtime's. Tests on this stand-in compare them bit for bit with the same graph in ONNX Runtime: they
test what this project moves and binds, never what TensorRT computes.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.targets.tensorrt.device import Device
from nbl_export.targets.tensorrt.static.schedule import Profile

__all__ = ["Context", "FakeDevice", "FakeTensorRT", "FakeTensorRTX"]

_STREAM = 7
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class FakeDevice(Device):
    """Host memory behind integer addresses; work runs at once, or is recorded while something is captured."""

    stream = _STREAM

    def __init__(self, *, captures: bool = True) -> None:
        self.buffers: dict[int, np.ndarray] = {}
        self.captures, self.captured, self.replayed, self.closed = captures, 0, 0, False
        self._recording: list[Callable[[], None]] | None = None

    def allocate(self, size: int) -> int:
        buffer = np.full(size, 255, np.uint8)  # NaN, as memory may hold
        self.buffers[buffer.ctypes.data] = buffer
        return int(buffer.ctypes.data)

    def pinned(self, size: int) -> np.ndarray:
        return np.full(size, 255, np.uint8)

    def zero(self, address: int, size: int) -> None:
        self.buffers[address][:size] = 0

    def upload(self, address: int, array: np.ndarray) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, address: int, array: np.ndarray) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def synchronize(self) -> None:
        pass

    def submit(self, work: Callable[[], None]) -> None:
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        from nbl_export.errors import NblError

        if not self.captures:
            raise NblError("the GPU refuses cudaStreamEndCapture: cudaErrorStreamCaptureInvalidated")
        recorded: list[Callable[[], None]] = []
        self._recording = recorded
        work()
        self._recording = None
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            for item in recorded:
                item()

        return replay

    def close(self) -> None:
        self.buffers.clear()
        self.closed = True


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class CudaGraphStrategy(enum.Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY, EAGER, NONE = range(3)


class FakeTensorRT:
    """Stands in for the module: `Runtime`, what it makes, `ILogger`."""

    __version__ = "1.2.3"
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    device_memory_size_v2 = 4096

    class ILogger:
        VERBOSE = Severity.VERBOSE

    def __init__(self, device: FakeDevice, profiles: tuple[Profile, ...]) -> None:
        self.device, self.profiles = device, profiles
        self.num_optimization_profiles = len(profiles)
        self.contexts: list[Context] = []

    def say(self, severity: str, text: str) -> bool:
        """Log; answers False."""
        self._logger.log(Severity[severity], text)
        return False

    def Runtime(self, logger: Any) -> FakeTensorRT:
        self._logger = logger
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> FakeTensorRT | None:
        graph = Path(plan.decode())
        if not graph.is_file():
            return None
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3  # it warns of each cache that is copied
        options.add_session_config_entry("session.disable_prepacking", "1")  # as `OnnxDecoder`, to the last bit
        self.graph = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        return self

    def create_runtime_config(self) -> Config:
        return Config()

    def create_execution_context(self, config: Config) -> Context | None:
        self.contexts.append(self.context(config))
        return self.contexts[-1]

    def context(self, config: Config) -> Context:
        return Context(self, config)


class Config:
    """`IRuntimeConfig`; like a pybind11 object, it refuses attributes that it does not have."""

    __slots__ = ("memory",)

    def __init__(self) -> None:
        self.memory = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.memory = strategy


class FakeTensorRTX(FakeTensorRT):
    """TensorRT for RTX: compiles kernels for profiles and shapes that its cache lacks. `compiled` lists them.

    Its plans are built with REQUIRE_USER_ALLOCATION, so a context that would allocate is refused.
    """

    CudaGraphStrategy = CudaGraphStrategy
    DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy

    def __init__(self, device: FakeDevice, profiles: tuple[Profile, ...]) -> None:
        super().__init__(device, profiles)
        self.compiled: list[str] = []

    def create_runtime_config(self) -> RtxConfig:
        return RtxConfig(self)

    def create_execution_context(self, config: Config) -> Context | None:
        if config.memory is not ExecutionContextAllocationStrategy.USER_MANAGED:
            self.say("ERROR", "the engine requires memory of the user")
            return None
        return super().create_execution_context(config)


class RtxConfig(Config):
    __slots__ = ("cache", "cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy", "trt")

    def __init__(self, trt: FakeTensorRTX) -> None:
        super().__init__()
        self.trt, self.cache = trt, Kernels(trt)
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def create_runtime_cache(self) -> Kernels:
        return Kernels(self.trt)

    def set_runtime_cache(self, cache: Kernels) -> bool:
        self.cache = cache
        return True


class Kernels:
    """`IRuntimeCache`: takes no bytes of another format."""

    def __init__(self, trt: FakeTensorRTX) -> None:
        self._trt = trt
        self.names: list[str] = []

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"kernels:"):
            return self._trt.say("WARNING", "[Runtime Cache]: Unrecognised wire format; rejecting cache.")
        self.names = blob.decode().removeprefix("kernels:").split(";")
        return True

    def serialize(self) -> bytes:
        return b"kernels:" + ";".join(self.names).encode()

    def need(self, name: str) -> None:
        if name not in self.names:
            self.names.append(name)
            self._trt.compiled.append(name)


class Context:
    """One execution context."""

    def __init__(self, trt: FakeTensorRT, config: Config) -> None:
        self._trt, self._device, self.config = trt, trt.device, config
        graphs = getattr(config, "cuda_graph_strategy", None)
        self.graphs_by_itself = graphs is CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._session = trt.graph
        self._dtypes = {a.name: _DTYPES[a.type] for a in [*trt.graph.get_inputs(), *trt.graph.get_outputs()]}
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.runs: list[tuple[int, ...]] = []
        self.profile = 0
        self.memory: tuple[int, int] | None = None  # address and size

    def set_device_memory(self, memory: int, size: int) -> None:
        if self.config.memory is not ExecutionContextAllocationStrategy.USER_MANAGED:
            self._trt.say("ERROR", "setDeviceMemory: Context not created with user managed device memory")
        elif size < self._trt.device_memory_size_v2:
            self._trt.say("ERROR", "setDeviceMemoryV2: The provided memory size is too small.")
        else:
            self.memory = (memory, size)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if stream != _STREAM or index >= len(self._trt.profiles):
            self._trt.say("ERROR", f"profile index {index} is out of range")
            raise RuntimeError("Error in set optimization profile async.")
        self.profile = index
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._dtypes or self._trt.say("ERROR", f"{name} is no tensor")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        profile = self._trt.profiles[self.profile]
        tokens = shape[1] if name == "input_ids" else profile.tokens[0]
        self._shapes[name] = shape
        good = profile.takes(shape[0], tokens)
        return good or self._trt.say("ERROR", f"{name}: {shape} does not satisfy any optimization profiles")

    def execute_async_v3(self, stream: int) -> bool:
        if self.memory is None and self.config.memory is ExecutionContextAllocationStrategy.USER_MANAGED:
            return self._trt.say("ERROR", "setDeviceMemoryV2 should be called before enqueue/execute.")
        if stream != _STREAM:
            return False
        shapes = dict(self._shapes)
        if isinstance(self.config, RtxConfig):
            self.config.cache.need(f"{self.profile} {shapes.get('input_ids', '')}")
        self._device.submit(lambda: self._run(shapes))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.runs.append(shapes.get("input_ids", ()))
        feeds = {a.name: self._array(a.name, shapes[a.name]) for a in self._session.get_inputs()}
        names = [a.name for a in self._session.get_outputs()]
        for name, value in zip(names, self._session.run(names, feeds), strict=True):
            if name.startswith("present."):
                assert self._addresses[name] == self._addresses[name.replace("present", "past_key_values")]
            self._array(name, value.shape)[...] = self.computed(name, value, feeds)

    def computed(self, _name: str, value: np.ndarray, _feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """What is written for an output; a fault may change it."""
        return value

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(self._dtypes[name])
        size = int(np.prod(shape)) * dtype.itemsize
        raw = (ctypes.c_ubyte * size).from_address(self._addresses[name])
        return np.ndarray(shape, dtype, memoryview(raw))
