"""Errors that a user can act on: the message says what is wrong, where, and what to do."""

__all__ = [
    "BusyError",
    "CorruptError",
    "MissingPackageError",
    "NblError",
    "ParityError",
    "RefusalError",
    "UsageError",
    "install",
]


class NblError(Exception):
    """Anything that the user can correct. Printed as one line, without a traceback; exit status 1."""

    exit_code = 1


class UsageError(NblError):
    """An option that is wrong for any model and any files; exit status 2."""

    exit_code = 2


class BusyError(NblError):
    """Another process holds the run directory."""


class CorruptError(NblError):
    """A file of a run directory differs from what was written."""


def install(extra: str) -> str:
    """What installs an extra, in words. The package is on no index."""
    return f"pip install '.[{extra}]' in a clone of nbl-export"


class MissingPackageError(NblError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}, which is not installed: {install(extra)}")


class RefusalError(NblError):
    """A graph pass found something unsupported and changed nothing.

    layer: the decoder layer, or None for the whole graph. reason: why.
    """

    def __init__(self, layer: int | None, reason: str) -> None:
        where = "the graph" if layer is None else f"layer {layer}"
        super().__init__(f"cannot rewrite {where}: {reason}")
        self.layer = layer
        self.reason = reason


class ParityError(NblError):
    """A graph or an engine does not compute what its reference computes; exit status 3."""

    exit_code = 3


def one_line(error: BaseException) -> str:
    """An exception as one line; a long message keeps its end, where ONNX Runtime puts the cause."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"...{text[-300:]}"
