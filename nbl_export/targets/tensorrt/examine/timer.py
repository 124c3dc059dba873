"""Times work on a device's stream by the GPU's own events (CUDA runtime, "cudaEventElapsedTime")."""

from __future__ import annotations

from typing import Any, Protocol

from nbl_export.errors import NblError
from nbl_export.targets.tensorrt.device import CudaPython, Device, Torch

__all__ = ["Timer", "open_timer"]


class Timer(Protocol):
    """A pair of events on one stream."""

    def start(self) -> None:
        """Record the first event."""

    def stop(self) -> float:
        """Record the second event and wait for it; returns the seconds between both."""


def open_timer(device: Device) -> Timer:
    """A timer on the stream of a device.

    Raises:
        NblError: the device has no events.
    """
    if isinstance(device, CudaPython):
        return _CudaPythonTimer(device)
    if isinstance(device, Torch):
        return _TorchTimer(device)
    raise NblError(f"{device.title} has no events to time with")


class _CudaPythonTimer:
    def __init__(self, device: CudaPython) -> None:
        self._device, self._rt = device, device._rt
        self._events = [device._call(self._rt.cudaEventCreate) for _ in range(2)]

    def start(self) -> None:
        self._device._call(self._rt.cudaEventRecord, self._events[0], self._device._stream)

    def stop(self) -> float:
        first, second = self._events
        self._device._call(self._rt.cudaEventRecord, second, self._device._stream)
        self._device._call(self._rt.cudaEventSynchronize, second)
        return float(self._device._call(self._rt.cudaEventElapsedTime, first, second)) / 1000  # it gives milliseconds


class _TorchTimer:
    def __init__(self, device: Torch) -> None:
        self._stream: Any = device._stream
        self._events = [device._torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def start(self) -> None:
        self._events[0].record(self._stream)

    def stop(self) -> float:
        first, second = self._events
        second.record(self._stream)
        second.synchronize()
        return float(first.elapsed_time(second)) / 1000  # it gives milliseconds
