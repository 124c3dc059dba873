"""Collects what TensorRT logs: parser and builder share one logger, and warnings decide.

TensorRT takes ONE logger per process: while any builder, runtime or refitter lives, a second logger is ignored with a
warning. So each library has one logger here, whose sink is exchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Message", "Messages", "complaints", "ignored_inputs", "messages_of"]

# Messages that appear for every graph and mean nothing (seen with TensorRT-RTX 1.7.1): a note on each int64 input, the
# echo of every error without a GPU, and the second logger if other code has made the first.
_NOISE = ("has Int64 binding", "catchCudaError", "The logger passed into")
# How the builder reports an input that the parser dropped silently.
_IGNORED = ("Unused Input", "is unused or used only at compile-time")
_SERIOUS = ("WARNING", "ERROR", "INTERNAL_ERROR")


@dataclass(frozen=True)
class Message:
    """A message of the library.

    Attributes:
        severity: the library's own name of the severity.
    """

    severity: str
    text: str


class Messages:
    """The logger of a library, and the sink that it fills at present."""

    def __init__(self, trt: Any) -> None:
        self._sinks: list[list[Message]] = []
        outer = self

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)  # pybind11 wants the base's own __init__

            def log(self, severity: Any, msg: str) -> None:
                if severity != trt.ILogger.VERBOSE:  # thousands of lines for a small graph
                    for sink in outer._sinks[-1:]:
                        sink.append(Message(severity.name, msg))

        self.logger = Logger()

    @contextlib.contextmanager
    def collected(self) -> Iterator[list[Message]]:
        """Collect the messages of the block."""
        sink: list[Message] = []
        self._sinks.append(sink)
        try:
            yield sink
        finally:
            self._sinks.remove(sink)


_LOGGERS: dict[int, Messages] = {}


def messages_of(trt: Any) -> Messages:
    """The only logger of a library."""
    if id(trt) not in _LOGGERS:
        _LOGGERS[id(trt)] = Messages(trt)
    return _LOGGERS[id(trt)]


def complaints(messages: Sequence[Message]) -> list[str]:
    """Warnings and errors that matter, each as one line."""
    serious = (" ".join(m.text.split()) for m in messages if m.severity in _SERIOUS)
    return [text for text in serious if not any(noise in text for noise in _NOISE)]


def ignored_inputs(messages: Sequence[Message]) -> list[str]:
    """The complaints about inputs that are not read."""
    return [text for text in complaints(messages) if any(sign in text for sign in _IGNORED)]
