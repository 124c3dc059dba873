"""Hears what TensorRT says: parser and builder share one logger, some warnings decide, and no message is dropped.

    in a block (`explaining`)     kept for the block, which refuses, or warns when it has succeeded
    elsewhere                     Python's logging: complaints as warnings and errors, the rest with -v

TensorRT takes ONE logger per process: while any builder, runtime or refitter lives, a second logger is ignored with a
warning. So each library has one logger here, whose sink is exchanged.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nbl_export.errors import NblError

__all__ = ["Message", "Messages", "changes", "complaints", "errors", "messages_of", "require", "skipped"]

log = logging.getLogger(__name__)

# Messages that appear for every graph and mean nothing (seen with TensorRT-RTX 1.7.1): a note on each int64 input, the
# echo of every error without a GPU, and the second logger if other code has made the first.
_NOISE = ("has Int64 binding", "catchCudaError", "The logger passed into")
# Warnings of the parser after which an engine computes something else, since a part of the graph is dropped or changed
# (LOG_WARNING in the sources of onnx-tensorrt, texts in the parser of TensorRT-RTX 1.7.1). Others are passed on.
_CHANGES = ("clamp", "ignor", "not supported", "doesn't support", "supports only", "not guaranteed", "unused input")
_SKIPPED = "Skipping tactic"
_SERIOUS = {"WARNING": logging.WARNING, "ERROR": logging.ERROR, "INTERNAL_ERROR": logging.ERROR}
_LONGEST = 500  # characters of a message in an error


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
        self._sink: list[Message] | None = None
        outer = self

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)  # pybind11 wants the base's own __init__

            def log(self, severity: Any, msg: str) -> None:
                if severity != trt.ILogger.VERBOSE:  # thousands of lines for a small graph
                    outer._hear(Message(severity.name, msg))

        self.logger = Logger()

    def _hear(self, message: Message) -> None:
        if self._sink is not None:
            self._sink.append(message)
            log.debug("TensorRT: %s", _one_line(message.text))
        else:
            _pass_on(message)

    @contextlib.contextmanager
    def explaining(self, failure: str, advice: str = "") -> Iterator[list[Message]]:
        """Collect the messages of the block, and turn the library's refusal into an error that quotes them.

        The library refuses with False or None (see `require`), with RuntimeError, or with TypeError if a constructor
        gives no object. If the block succeeds, its complaints become warnings.

        Args:
            failure: begins the error; `require` may begin it more precisely.
            advice: ends the error.

        Raises:
            NblError: the library has refused.
        """
        said: list[Message] = []
        outer = self._sink
        self._sink = said
        try:
            yield said
        except NblError:
            raise
        except Exception as error:
            silent = isinstance(error, _Refused)
            began = str(error) if silent and str(error) else failure
            # RuntimeError says nothing that its text does not
            kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
            own = "it gives no reason" if silent else _one_line(f"{kind}{error}")
            why = (complaints(said) or [own])[0][:_LONGEST]
            raise NblError("; ".join([f"{began}: {why}", *([advice] if advice else [])])) from error
        finally:
            self._sink = outer
        for message in said:
            if complaints([message]):
                _pass_on(message)


class _Refused(Exception):
    """The library answered False or None; the text begins the error, or is empty."""


def require(answer: Any, what: str = "") -> Any:
    """The answer of the library, inside a block of `Messages.explaining`; False and None end the block.

    Args:
        what: what was asked for, for the error.
    """
    if answer is None or answer is False:
        raise _Refused(f"TensorRT refuses {what}" if what else "")
    return answer


def _pass_on(message: Message) -> None:
    level = _SERIOUS[message.severity] if complaints([message]) else logging.DEBUG
    log.log(level, "TensorRT: %s", _one_line(message.text))


_LOGGERS: dict[int, Messages] = {}


def messages_of(trt: Any) -> Messages:
    """The only logger of a library."""
    if id(trt) not in _LOGGERS:
        _LOGGERS[id(trt)] = Messages(trt)
    return _LOGGERS[id(trt)]


def complaints(messages: Sequence[Message]) -> list[str]:
    """Warnings and errors that matter, each as one line."""
    serious = (_one_line(m.text) for m in messages if m.severity in _SERIOUS)
    return [text for text in serious if not any(noise in text for noise in _NOISE)]


def errors(messages: Sequence[Message]) -> list[str]:
    """Errors alone, each as one line: why a builder gives up. A tactic that it skips is one of many."""
    return [text for text in complaints([m for m in messages if m.severity != "WARNING"]) if _SKIPPED not in text]


def skipped(messages: Sequence[Message]) -> list[str]:
    """The complaints about tactics that the builder skipped, most often because memory is short for them."""
    return [text for text in complaints(messages) if _SKIPPED in text]


def changes(messages: Sequence[Message]) -> list[str]:
    """The parser's complaints about a graph that its network would not compute."""
    return [text for text in complaints(messages) if any(sign in text.lower() for sign in _CHANGES)]


def _one_line(text: str) -> str:
    return " ".join(text.split())
