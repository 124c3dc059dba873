"""What TensorRT says, collected: parser and builder talk through one logger, warnings decide.

TensorRT takes ONE logger per process: while any builder, runtime or refitter lives, a second one is ignored with
a warning. So there is one per library, with a sink that is swapped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Message", "Messages", "complaints", "ignored_inputs", "messages_of"]

# What is said of every graph, and means nothing (seen with TensorRT-RTX 1.7.1): a note on each int64 input, the
# echo of every error where there is no GPU, and the second logger where somebody else has made the first.
_NOISE = ("has Int64 binding", "catchCudaError", "The logger passed into")
# How the builder speaks of an input that the parser dropped without a word.
_IGNORED = ("Unused Input", "is unused or used only at compile-time")
_SERIOUS = ("WARNING", "ERROR", "INTERNAL_ERROR")


@dataclass(frozen=True)
class Message:
    """severity: the library's own name for it."""

    severity: str
    text: str


class Messages:
    """The logger of a library and the sink that it fills now."""

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
        """What is said inside the block."""
        sink: list[Message] = []
        self._sinks.append(sink)
        try:
            yield sink
        finally:
            self._sinks.remove(sink)


_LOGGERS: dict[int, Messages] = {}


def messages_of(trt: Any) -> Messages:
    """The one logger of a library."""
    if id(trt) not in _LOGGERS:
        _LOGGERS[id(trt)] = Messages(trt)
    return _LOGGERS[id(trt)]


def complaints(messages: Sequence[Message]) -> list[str]:
    """Warnings and errors that mean something, each as one line."""
    serious = (" ".join(m.text.split()) for m in messages if m.severity in _SERIOUS)
    return [text for text in serious if not any(noise in text for noise in _NOISE)]


def ignored_inputs(messages: Sequence[Message]) -> list[str]:
    """The complaints that say an input is not read."""
    return [text for text in complaints(messages) if any(sign in text for sign in _IGNORED)]
