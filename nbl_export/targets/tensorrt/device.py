"""Memory, a stream and captured graphs on the first GPU, through cuda-python.

Every failure is an NblError. While a step is captured, other threads may use the GPU (capture mode "thread local", as
in NVIDIA's trtexec).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from nbl_export.errors import NblError
from nbl_export.targets.gpu import Gpu, find_gpu, outdated, release_for

__all__ = ["Device", "check_device", "missing_package", "open_device"]


_PACKAGE = "cuda-python"


def missing_package() -> str:
    """What is missing, as a sentence without a full stop; "" if cuda-python is installed."""
    if importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None:
        return ""
    return f"device memory needs the package {_PACKAGE} (pip install {release_for(find_gpu()).bindings})"


def check_device(gpu: Gpu) -> None:
    """Make a stream on the GPU and free it: only a first call shows a driver that is too old for the package.

    Raises:
        NblError: there is no usable package, or the GPU makes no stream; the message says what to change.
    """
    try:
        open_device().close()
    except NblError as error:
        raise NblError(f"{error}{_driver_advice(gpu)}") from error


def _driver_advice(gpu: Gpu) -> str:
    """What to change if the bindings are of a newer CUDA than the driver; "" if they are not."""
    try:
        version = importlib.metadata.version("cuda-bindings")
    except importlib.metadata.PackageNotFoundError:
        return ""
    instead = f"pip install {release_for(gpu).bindings}"
    old = outdated(gpu, f"the installed cuda-python {version}", int(version.split(".")[0]), instead)
    return f" ({old})" if old else ""


def open_device() -> Device:
    """Open the first GPU.

    Raises:
        NblError: there is no usable package, or it does not reach the GPU.
    """
    if missing := missing_package():
        raise NblError(missing)
    with _errors_of("a stream on the GPU"):
        return Device()


@contextlib.contextmanager
def _errors_of(what: str) -> Iterator[None]:
    """Turn an exception of the package into an NblError."""
    try:
        yield
    except NblError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise NblError(f"{_PACKAGE} refuses {what}: {type(error).__name__}: {text}") from error


class Device:
    """GPU memory and one stream. Addresses are integers; all work is ordered on `stream`.

    Each call of the CUDA runtime returns (status, values...).
    """

    def __init__(self) -> None:
        self._rt: Any = importlib.import_module("cuda.bindings.runtime")
        self._freeing = contextlib.ExitStack()
        self._stream = self._call(self._rt.cudaStreamCreateWithFlags, self._rt.cudaStreamNonBlocking)
        self._free_by(self._rt.cudaStreamDestroy, self._stream)
        self.stream = int(self._stream)

    def _free_by(self, function: Any, made: Any) -> None:
        self._freeing.callback(self._call, function, made)

    def _call(self, function: Any, *arguments: Any) -> Any:
        with _errors_of(function.__name__):
            status, *values = function(*arguments)
        if int(status):
            raise NblError(f"the GPU refuses {function.__name__}: {status.name}")
        return values[0] if values else None

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes; returns their address.

        Raises:
            NblError: the GPU has no memory left.
        """
        try:
            address = int(self._call(self._rt.cudaMalloc, size))
        except NblError as error:
            raise NblError(
                f"the GPU gives no further {size / 2**20:,.1f} MiB ({error}); use a smaller --max-seq-len, key "
                "max_batch or key prefill_chunk"
            ) from error
        self._free_by(self._rt.cudaFree, address)
        return address

    def pinned(self, size: int) -> np.ndarray:
        """Bytes of host memory that the device reads and writes by itself, so that a copy needs no second one."""
        address = int(self._call(self._rt.cudaHostAlloc, size, self._rt.cudaHostAllocDefault))
        self._free_by(self._rt.cudaFreeHost, address)
        return np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(address))

    def zero(self, address: int, size: int) -> None:
        self._call(self._rt.cudaMemsetAsync, address, 0, size, self._stream)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array; the array may change after `synchronize`."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._rt.cudaMemcpyAsync, address, array.ctypes.data, array.nbytes, kind, self._stream)

    def download(self, address: int, array: np.ndarray) -> None:
        """Copy into a contiguous array; the data is there after `synchronize`."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._rt.cudaMemcpyAsync, array.ctypes.data, address, array.nbytes, kind, self._stream)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call(self._rt.cudaStreamSynchronize, self._stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` puts on the stream, without running it; returns a function that runs the record.

        Raises:
            NblError: `work` failed, which comes first, or its work cannot be recorded.
        """
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._rt.cudaStreamBeginCapture, self._stream, mode)
        try:
            work()
        except BaseException:
            with contextlib.suppress(NblError):  # the failed work has invalidated the record
                self._call(self._rt.cudaStreamEndCapture, self._stream)
            raise
        graph = self._call(self._rt.cudaStreamEndCapture, self._stream)
        self._free_by(self._rt.cudaGraphDestroy, graph)
        ready = self._call(self._rt.cudaGraphInstantiate, graph, 0)
        self._free_by(self._rt.cudaGraphExecDestroy, ready)
        return lambda: self._call(self._rt.cudaGraphLaunch, ready, self._stream)

    def close(self) -> None:
        """Free all memory, the records and the stream, also after an error.

        Raises:
            NblError: a failure, after everything has been tried.
        """
        self._freeing.close()
