"""The decode step as a CUDA graph: captured behind its first run, replayed while its shape stays.

    first step of a shape       TensorRT:      run, then capture          TensorRT-RTX:  run three times
    every further step          TensorRT:      replay                     TensorRT-RTX:  run; the library replays

TensorRT asks for one ordinary run before the capture. TensorRT-RTX captures by itself ("Working with RTX CUDA Graphs"),
and begins behind a run that warms up. So a session has its graph behind the first step, and all further steps take the
same way. A repeated step changes nothing: the same tokens go into the same slots.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from nbl_export.errors import NblError
from nbl_export.targets.tensorrt.device import Device

__all__ = ["DecodeStep"]

log = logging.getLogger(__name__)

_RUNS = 3  # of TensorRT-RTX: to warm up, to capture, to replay


class DecodeStep:
    """Runs the decode step of a session.

    Args:
        graphs: whether the step becomes a graph; without, it always runs as it is.
        by_library: whether the library captures by itself.
    """

    def __init__(self, device: Device, *, graphs: bool, by_library: bool) -> None:
        self._device, self._graphs, self._by_library = device, graphs, by_library
        self._shape: tuple[int, ...] | None = None
        self._replay: Callable[[], None] | None = None

    def reset(self) -> None:
        """Forget the graph, because addresses change."""
        self._shape = self._replay = None

    def run(self, shape: tuple[int, ...], execute: Callable[[], None]) -> None:
        """Run `execute`, or its captured graph.

        Args:
            shape: of the step's tokens; a graph of another shape is forgotten.
            execute: puts the step on the stream, the same work whenever `shape` is the same.
        """
        if shape == self._shape:
            (self._replay or execute)()
            return
        self.reset()
        execute()
        if self._graphs and self._by_library:
            for _ in range(1, _RUNS):
                execute()
        elif self._graphs:
            self._capture(execute)
        self._shape = shape

    def _capture(self, execute: Callable[[], None]) -> None:
        try:
            self._replay = self._device.capture(execute)
        except NblError as error:
            log.warning("the decode step runs without a CUDA graph, which is slower: %s", error)
            self._graphs = False
