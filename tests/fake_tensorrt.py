"""A TensorRT whose contexts run the graph on ONNX Runtime, and a GPU whose memory is the host's.

The plan is the path of a graph. As on a GPU, tensors are addresses, work goes onto a stream, a captured step is
replayed with the shapes it was captured with. What TensorRT refuses is answered as its bindings answer: tests see the
stand-in through `tensorrt_api.held`, which holds every name and answer to those of the bindings.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.engines.static.schedule import Profile

__all__ = ["FakeDevice", "FakeTensorRT"]

_STREAM = 7
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class FakeDevice:
    """Host memory behind integer addresses; work runs at once, or is recorded while something is captured."""

    title = "host memory"
    stream = _STREAM

    def __init__(self, *, captures: bool = True) -> None:
        self.buffers: dict[int, np.ndarray] = {}
        self.captures, self.captured, self.replayed, self.closed = captures, 0, 0, False
        self._recording: list[Callable[[], None]] | None = None

    def allocate(self, size: int) -> int:
        buffer = np.full(size, 255, np.uint8)  # NaN, as memory may hold
        self.buffers[buffer.ctypes.data] = buffer
        return int(buffer.ctypes.data)

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


class FakeTensorRT:
    """Stands in for the module: `Runtime`, what it makes, `ILogger`."""

    __version__ = "1.2.3"

    class ILogger:
        VERBOSE = "VERBOSE"

    class CudaGraphStrategy:
        WHOLE_GRAPH_CAPTURE = "whole"

    def __init__(self, device: FakeDevice, profiles: tuple[Profile, ...]) -> None:
        self.device, self.profiles = device, profiles
        self.contexts: list[Context] = []

    def Runtime(self, _logger: Any) -> FakeTensorRT:
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> FakeTensorRT | None:
        self._graph = Path(plan.decode())
        return self if self._graph.is_file() else None

    def create_runtime_config(self) -> Any:
        return type("Config", (), {"cuda_graph_strategy": None})()

    def create_execution_context(self, config: Any = None) -> Context:
        self.contexts.append(Context(self, self._graph, config))
        return self.contexts[-1]


class Context:
    """One execution context."""

    def __init__(self, trt: FakeTensorRT, graph: Path, config: Any) -> None:
        import onnxruntime as ort

        self._trt, self._device = trt, trt.device
        self.graphs_by_itself = config is not None and config.cuda_graph_strategy == "whole"
        self._session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        self._dtypes = {a.name: _DTYPES[a.type] for a in [*self._session.get_inputs(), *self._session.get_outputs()]}
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.runs: list[tuple[int, ...]] = []
        self.profile = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if stream != _STREAM or index >= len(self._trt.profiles):
            raise RuntimeError("Error in set optimization profile async.")
        self.profile = index
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._dtypes

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        tokens = shape[1] if name == "input_ids" else self._trt.profiles[self.profile].tokens[0]
        self._shapes[name] = shape
        return self._trt.profiles[self.profile].takes(shape[0], tokens)

    def execute_async_v3(self, stream: int) -> bool:
        shapes = dict(self._shapes)
        self._device.submit(lambda: self._run(shapes))
        return stream == _STREAM

    def _run(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.runs.append(shapes["input_ids"])
        feeds = {a.name: self._array(a.name, shapes[a.name]) for a in self._session.get_inputs()}
        names = [a.name for a in self._session.get_outputs()]
        for name, value in zip(names, self._session.run(names, feeds), strict=True):
            if name.startswith("present."):
                assert self._addresses[name] == self._addresses[name.replace("present", "past_key_values")]
            self._array(name, value.shape)[...] = value

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(self._dtypes[name])
        size = int(np.prod(shape)) * dtype.itemsize
        raw = (ctypes.c_ubyte * size).from_address(self._addresses[name])
        return np.ndarray(shape, dtype, memoryview(raw))
