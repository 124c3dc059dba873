"""Device memory through cuda-python: what fails is one error of ours, and everything is freed."""

from __future__ import annotations

import enum
import types
from collections.abc import Callable
from typing import Any

import pytest

from nbl_export.errors import NblError
from nbl_export.targets.tensorrt import device
from nbl_export.targets.tensorrt.device import Device, open_device

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


def cuda(monkeypatch: pytest.MonkeyPatch, **fails: Status | Exception) -> tuple[Device, Runtime]:
    runtime = Runtime()
    monkeypatch.setattr(device.importlib, "import_module", lambda _name: runtime)
    opened = Device()
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
    replay = opened.capture(lambda: opened.zero(1, 2))
    replay()
    names = [call[0] for call in runtime.calls if "Create" not in call[0]]
    assert names == ["cudaStreamBeginCapture", "cudaMemsetAsync", "cudaStreamEndCapture",
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


def test_closing_frees_everything_and_tells_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, runtime = cuda(monkeypatch)
    for size in (1, 2):
        opened.allocate(size)
    opened.capture(lambda: None)
    runtime.calls.clear()
    broken = Status.cudaErrorIllegalAddress
    runtime.fails = {"cudaGraphDestroy": broken, "cudaFree": broken, "cudaStreamDestroy": broken}
    with pytest.raises(NblError, match=r"^the GPU refuses cudaStreamDestroy: cudaErrorIllegalAddress$"):
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
        (ImportError("libcuda.so.1"), "cuda-python refuses a stream on the GPU: ImportError: libcuda.so.1"),
    ],
)
def test_a_device_that_does_not_open_is_one_sentence(
    answer: Status | Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_name: str) -> Runtime:
        if isinstance(answer, ImportError):
            raise answer
        return Runtime(cudaStreamCreateWithFlags=answer)

    monkeypatch.setattr(device, "missing_package", lambda: "")
    monkeypatch.setattr(device.importlib, "import_module", load)
    with pytest.raises(NblError, match=reason):
        open_device()


def test_pinned_memory_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, runtime = cuda(monkeypatch)
    assert opened.pinned(64).nbytes == 64
    runtime.calls.clear()
    opened.close()
    assert [call[0] for call in runtime.calls] == ["cudaFreeHost", "cudaStreamDestroy"]
