"""The two TensorRT libraries as data, loaded at first use.

Hears what TensorRT says: parser and builder share one logger, some warnings decide, and no message is dropped.

    in a block that collects      kept for the block, which refuses, or warns when it has succeeded
    elsewhere                     Python's logging: complaints as warnings and errors, the rest with -v

TensorRT takes ONE logger per process: while any builder, runtime or refitter lives, a second logger is ignored with a
warning. So each library has one logger here, whose sink is exchanged.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from nbl_export.errors import NblError
from nbl_export.records.capabilities import Capabilities
from nbl_export.targets.gpu import CudaRelease, find_gpu, release_for, unpackaged

__all__ = ["LAYERS_NOTE", "LIBRARIES", "FusedAttention", "Library", "Message", "Messages", "changes", "complaints",
           "ignored_inputs", "load_library", "messages_of", "require"]  # fmt: skip


@dataclass(frozen=True)
class FusedAttention:
    """The attention that a library is known to have fused kernels for; numbers of heads make no difference."""

    head_sizes: range
    precisions: tuple[str, ...]

    def lacks(self, head_size: int, precision: str) -> str:
        """What there is no kernel for, in words; "" if there is a kernel."""
        if precision not in self.precisions:
            return precision
        if head_size not in self.head_sizes:
            step, least, most = self.head_sizes.step, self.head_sizes[0], self.head_sizes[-1]
            return f"heads of size {head_size} (it is for multiples of {step} from {least} to {most})"
        return ""


@dataclass(frozen=True)
class Library:
    """TensorRT or TensorRT for RTX.

    Attributes:
        module: name to import.
        package: name for pip, of the newest CUDA.
        origin: where the library comes from, if not from PyPI.
        runtime_graphs: whether the library captures CUDA graphs by itself.
        jit: whether the library compiles kernels when an engine loads. If so, a cache of kernels can be kept, and the
            builder proves that a step can be captured.
        computes: compute capabilities that the library runs on; empty means `least_compute` and later.
        default_targets: compute capabilities of a plan by default; empty means the GPU at hand.
        other: the engine to try instead.
        target_prefix: begins the library's names of compute capabilities.
        weak_computes: compute capabilities without bf16 and int4.
        fused: what has fused attention kernels; None if only the library's builder can tell.
    """

    capabilities: Capabilities
    module: str
    package: str
    origin: str
    builds_without_gpu: bool
    runtime_graphs: bool
    jit: bool
    computes: tuple[str, ...]
    least_compute: str
    default_targets: tuple[str, ...]
    other: str
    target_prefix: str = "SM"
    weak_computes: tuple[str, ...] = ("7.5",)
    fused: FusedAttention | None = None

    def how_to_get(self, release: CudaRelease) -> str:
        """The command that installs the library and the bindings of a CUDA release."""
        return f"pip install {self.package}{release.suffix} {release.bindings}{self.origin}"

    def runs_on(self, compute: str) -> bool:
        """Whether the library has kernels for a compute capability."""
        if self.computes:
            return compute in self.computes
        return _version(compute) >= _version(self.least_compute)


_SYSTEM = Path("/usr/lib")  # JetPack and Debian packages put Python modules below it, where no environment looks
_PRECISIONS = ("fp16", "bf16", "int4")
_SOURCES = {"static": ("fp32", *_PRECISIONS)}


_COMPILED: dict[str, Any] = {
    "static": True, "proven_by": "ort", "cross": True, "dense_caches": True,
    "cache_bytes": dict.fromkeys(_PRECISIONS, 2),
}  # fmt: skip


LIBRARIES = {
    "trt": Library(
        # bf16 first: fused attention in fp16 sums in fp16 (see `static_form.numbers`), which shows in long texts
        capabilities=Capabilities("trt", "TensorRT", ("bf16", "fp16", "int4"), _SOURCES, **_COMPILED),
        module="tensorrt",
        package="tensorrt",
        origin=" (its libraries come from NVIDIA's own package index)",
        builds_without_gpu=False,
        runtime_graphs=False,
        jit=False,
        computes=(),
        least_compute="7.5",
        default_targets=(),
        other="trt-rtx",
    ),
    "trt-rtx": Library(
        capabilities=Capabilities("trt-rtx", "TensorRT for RTX", _PRECISIONS, _SOURCES, **_COMPILED),
        module="tensorrt_rtx",
        package="tensorrt-rtx",
        origin="",
        builds_without_gpu=True,
        runtime_graphs=True,
        jit=True,
        computes=("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
        least_compute="7.5",
        default_targets=("8.0", "8.6", "8.9", "12.0", "12.1"),
        other="trt",
        # found by building with version 1.7.1
        fused=FusedAttention(range(16, 257, 8), _PRECISIONS),
    ),
}


def load_library(library: Library) -> ModuleType:
    """Import the library's module.

    Raises:
        NblError: the package is not installed, or does not load; the message says how to get it.
    """
    if importlib.util.find_spec(library.module) is None:
        raise NblError(f"the package {library.package} is not installed: {_advice(library)}")
    try:
        return importlib.import_module(library.module)
    except Exception as error:  # a package without its libraries raises FileNotFoundError, OSError, ImportError
        raise NblError(f"the package {library.package} does not load ({error}): {_advice(library)}") from error


def _advice(library: Library) -> str:
    """How to install a library that fits the driver of this machine."""
    gpu = find_gpu()
    found = sorted(_SYSTEM.glob(f"python3*/dist-packages/{library.module}"))
    first = f"make the environment with --system-site-packages to see that in {found[0].parent}, or " if found else ""
    return first + (unpackaged(gpu) or library.how_to_get(release_for(gpu)))


def _version(compute: str) -> tuple[int, ...]:
    return tuple(int(part) for part in compute.split("."))


log = logging.getLogger(__name__)

# Messages that appear for every graph and mean nothing (seen with TensorRT-RTX 1.7.1): a note on each int64 input, the
# echo of every error without a GPU, and the second logger if other code has made the first.
_NOISE = ("has Int64 binding", "catchCudaError", "The logger passed into")
# Warnings of the parser after which an engine computes something else, since a part of the graph is dropped or changed
# (LOG_WARNING in the sources of onnx-tensorrt, texts in the parser of TensorRT-RTX 1.7.1). Others are passed on.
_CHANGES = ("clamp", "ignor", "not supported", "doesn't support", "supports only", "not guaranteed", "unused input")
# How the builder reports an input that the parser dropped silently.
_IGNORED = ("Unused Input", "is unused or used only at compile-time")
_SERIOUS = {"WARNING": logging.WARNING, "ERROR": logging.ERROR, "INTERNAL_ERROR": logging.ERROR}
# The only note of the level VERBOSE that is kept: the layers of a plan, one a line.
LAYERS_NOTE = "Engine Layer Information"
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
        self._sinks: list[list[Message]] = []
        outer = self

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)  # pybind11 wants the base's own __init__

            def log(self, severity: Any, msg: str) -> None:
                # the other notes are thousands of lines for a small graph
                if severity != trt.ILogger.VERBOSE or msg.startswith(LAYERS_NOTE):
                    outer._hear(Message(severity.name, msg))

        self.logger = Logger()

    def _hear(self, message: Message) -> None:
        if self._sinks:
            self._sinks[-1].append(message)
            log.debug("TensorRT: %s", _one_line(message.text))
        else:
            _pass_on(message)

    @contextlib.contextmanager
    def collected(self) -> Iterator[list[Message]]:
        """Collect the messages of the block."""
        sink: list[Message] = []
        self._sinks.append(sink)
        try:
            yield sink
        finally:
            # by identity, because a list equals any other empty list
            self._sinks = [other for other in self._sinks if other is not sink]

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
        with self.collected() as said:
            try:
                yield said
            except NblError:
                raise
            except Exception as error:
                silent = isinstance(error, _Refused)
                began = str(error) if silent and str(error) else failure
                own = "it gives no reason" if silent else _one_line(f"{_kind(error)}{error}")
                why = (complaints(said) or [own])[0][:_LONGEST]
                raise NblError("; ".join([f"{began}: {why}", *([advice] if advice else [])])) from error
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


def changes(messages: Sequence[Message]) -> list[str]:
    """The parser's complaints about a graph that its network would not compute."""
    return [text for text in complaints(messages) if any(sign in text.lower() for sign in _CHANGES)]


def ignored_inputs(messages: Sequence[Message]) -> list[str]:
    """The complaints about inputs that are not read."""
    return [text for text in complaints(messages) if any(sign in text for sign in _IGNORED)]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _kind(error: Exception) -> str:
    """Type of an exception in front of its text; RuntimeError says nothing that the text does not."""
    return "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
