"""Device memory through cuda-python and torch: what fails is one error of ours, and everything is freed."""

from __future__ import annotations

import contextlib
import enum
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nbl_export.errors import NblError
from nbl_export.targets.tensorrt import device
from nbl_export.targets.tensorrt.device import CudaPython, Torch, attempt_all, open_device

pytestmark = pytest.mark.trt

WORK = NblError("TensorRT refuses a step: CUDA error 700")


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureInvalidated = 901


class Runtime:
    """`cuda.bindings.runtime`: every function answers (status, values...); `fails` says which do not succeed."""

    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread local")

    def __init__(self, **fails: Status | Exception) -> None:
        self.fails = fails
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def function(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            answer = self.fails.get(name, Status.cudaSuccess)
            if isinstance(answer, Exception):
                raise answer
            return (answer, len(self.calls))

        function.__name__ = name
        return function


def cuda(monkeypatch: pytest.MonkeyPatch, **fails: Status | Exception) -> tuple[CudaPython, Runtime]:
    runtime = Runtime()
    monkeypatch.setattr(device.importlib, "import_module", lambda _name: runtime)
    opened = CudaPython()
    runtime.fails = fails
    return opened, runtime


def fail() -> None:
    raise WORK


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (
            Status.cudaErrorMemoryAllocation,
            r"no further 2.0 MiB \(the GPU refuses cudaMalloc: cudaErrorMemoryAllocation",
        ),
        (RuntimeError("Function not found"), "cuda-python refuses cudaMalloc: RuntimeError: Function not found"),
    ],
)
def test_cuda_python_says_what_it_cannot_allocate(
    answer: Status | Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, _ = cuda(monkeypatch, cudaMalloc=answer)
    with pytest.raises(NblError, match=rf"{reason}.*use a smaller --max-seq-len"):
        opened.allocate(2 << 20)


def test_cuda_python_captures_for_its_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, runtime = cuda(monkeypatch)
    replay = opened.capture(lambda: runtime.calls.append(("work",)))
    replay()
    names = [call[0] for call in runtime.calls]
    assert names == ["cudaStreamCreateWithFlags", "cudaStreamBeginCapture", "work", "cudaStreamEndCapture",
                     "cudaGraphInstantiate", "cudaGraphLaunch"]  # fmt: skip
    assert runtime.calls[1][2] == "thread local"


def test_the_error_of_the_work_comes_before_that_of_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, runtime = cuda(monkeypatch, cudaStreamEndCapture=Status.cudaErrorStreamCaptureInvalidated)
    with pytest.raises(NblError) as caught:
        opened.capture(fail)
    assert caught.value is WORK
    assert runtime.calls[-1][0] == "cudaStreamEndCapture"
    with pytest.raises(NblError, match="cudaStreamEndCapture: cudaErrorStreamCaptureInvalidated"):
        opened.capture(lambda: None)


def test_closing_frees_everything_and_tells_the_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, runtime = cuda(monkeypatch)
    for size in (1, 2):
        opened.allocate(size)
    opened.capture(lambda: None)
    runtime.calls.clear()
    broken = Status.cudaErrorIllegalAddress
    runtime.fails = {"cudaGraphDestroy": broken, "cudaFree": broken, "cudaStreamDestroy": broken}
    with pytest.raises(NblError, match=r"^the GPU refuses cudaGraphDestroy: cudaErrorIllegalAddress$"):
        opened.close()
    assert [call[0] for call in runtime.calls] == [
        "cudaGraphExecDestroy", "cudaGraphDestroy", "cudaFree", "cudaFree", "cudaStreamDestroy"
    ]  # fmt: skip
    runtime.calls.clear()
    opened.close()  # nothing is left
    assert runtime.calls == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Status.cudaErrorInsufficientDriver, "the GPU refuses cudaStreamCreateWithFlags: cudaErrorInsufficientDriver"),
        (RuntimeError("no libcudart"), "cuda-python refuses cudaStreamCreateWithFlags: RuntimeError: no libcudart"),
    ],
)
def test_a_device_that_does_not_open_is_one_sentence(
    answer: Status | Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "find_backend", lambda: CudaPython)
    monkeypatch.setattr(device.importlib, "import_module", lambda _name: Runtime(cudaStreamCreateWithFlags=answer))
    with pytest.raises(NblError, match=reason):
        open_device()


def test_a_package_that_does_not_load_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> types.ModuleType:
        raise ImportError(f"{name}: libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(device, "find_backend", lambda: CudaPython)
    monkeypatch.setattr(device.importlib, "import_module", broken)
    with pytest.raises(NblError, match=r"cuda-python refuses a stream on the GPU: ImportError: .*libcuda.so.1"):
        open_device()


def test_pinned_memory_and_events_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, runtime = cuda(monkeypatch)
    assert opened.pinned(64).nbytes == 64
    for which in (0, 1, 0, 1):
        opened.mark(which)
    names = [call[0] for call in runtime.calls]
    assert names[1:] == ["cudaHostAlloc", "cudaEventCreate", "cudaEventCreate", *["cudaEventRecord"] * 4]
    first, second = (call[1] for call in runtime.calls[-4:-2])
    assert first != second and {call[2] for call in runtime.calls[-4:]} == {opened.stream}
    assert opened.between_marks() == (len(runtime.calls)) / 1000  # the stand-in answers the number of its calls, in ms
    assert runtime.calls[-1] == ("cudaEventElapsedTime", first, second)
    runtime.calls.clear()
    opened.close()
    assert [call[0] for call in runtime.calls] == ["cudaFreeHost", *["cudaEventDestroy"] * 2, "cudaStreamDestroy"]


class FakeTorch:
    """The parts of torch that are used; `fails` raises in them. A real torch raises RuntimeError for CUDA's errors."""

    uint8 = "uint8"

    def __init__(self) -> None:
        self.fails: dict[str, Exception] = {}
        self.seen: list[Any] = []
        self.streams = ["default"]
        self.cuda = self

    def _act(self, name: str) -> None:
        self.seen.append(name)
        if name in self.fails:
            raise self.fails[name]

    def Stream(self) -> Any:
        return types.SimpleNamespace(cuda_stream=7, synchronize=lambda: self._act("synchronize"))

    def CUDAGraph(self) -> Any:
        return types.SimpleNamespace(replay=lambda: self._act("replay"))

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before = self.streams[-1]
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.append(before)

    @contextlib.contextmanager
    def graph(self, _graph: Any, stream: Any, capture_error_mode: str = "global") -> Iterator[None]:
        """As torch's: the end of a failed capture raises, and the stream is not left then."""
        self.seen.append(capture_error_mode)
        self.streams.append(stream)
        yield
        self._act("capture_end")
        self.streams.pop()

    def empty(self, size: int, **_: Any) -> Any:
        self._act("empty")
        return types.SimpleNamespace(data_ptr=lambda: 1000 + size)


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> FakeTorch:
    fake = FakeTorch()
    monkeypatch.setattr(device.importlib, "import_module", lambda _name: fake)
    return fake


def test_torch_captures_for_its_own_thread(torch: FakeTorch) -> None:
    Torch().capture(lambda: torch.seen.append("work"))()
    assert torch.seen == ["thread_local", "work", "capture_end", "replay"]
    assert torch.streams[-1] == "default"


def test_torchs_capture_error_is_ours(torch: FakeTorch) -> None:
    torch.fails["capture_end"] = RuntimeError("CUDA error: operation failed due to a previous error\nduring capture")
    opened = Torch()
    with pytest.raises(NblError, match=r"torch refuses to capture a step: RuntimeError: CUDA error: .* during capture"):
        opened.capture(lambda: None)
    assert torch.streams[-1] == "default"
    with pytest.raises(NblError) as caught:
        opened.capture(fail)
    assert caught.value is WORK
    torch.fails.clear()
    with pytest.raises(NblError) as caught:
        opened.capture(fail)
    assert caught.value is WORK


def test_torchs_other_errors_are_ours(torch: FakeTorch) -> None:
    opened = Torch()
    replay = opened.capture(lambda: None)
    address = opened.allocate(8)
    torch.fails = {name: RuntimeError(f"CUDA error in {name}") for name in ("empty", "synchronize", "replay")}
    with pytest.raises(NblError, match=r"no further 4.0 MiB \(RuntimeError: CUDA error in empty\); use a smaller"):
        opened.allocate(4 << 20)
    with pytest.raises(NblError, match="torch refuses a captured step: RuntimeError: CUDA error in replay"):
        replay()
    with pytest.raises(NblError, match="torch refuses to wait for the stream"):
        opened.synchronize()
    with pytest.raises(NblError, match="torch refuses to clear memory: KeyError"):
        opened.zero(address + 1, 8)
    with pytest.raises(NblError, match="CUDA error in synchronize"):
        opened.close()
    assert opened._buffers == {}


def test_all_steps_are_attempted_and_the_first_failure_is_told() -> None:
    done: list[int] = []

    def step(number: int, error: Exception | None = None) -> Callable[[], None]:
        def run() -> None:
            done.append(number)
            if error:
                raise error

        return run

    with pytest.raises(NblError, match=r"^RuntimeError: second$"):
        attempt_all(step(1), step(2, RuntimeError("second")), step(3, NblError("third")), step(4))
    assert done == [1, 2, 3, 4]
    attempt_all(step(5))
