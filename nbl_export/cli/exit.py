"""How a command ends: one line on stderr if it failed, and the exit status."""

from __future__ import annotations

import logging
import signal
import sys
from typing import Any, NoReturn

from nbl_export.errors import NblError
from nbl_export.trust.terminal import visible

__all__ = ["GOES_ON", "INTERRUPTED", "Interrupts", "explain", "fail"]

INTERRUPTED = 130
_LONGEST = 1000  # characters of an error
GOES_ON = "interrupted; finished stages are kept, and the same command continues after them"


class Interrupts:
    """Turns signals into KeyboardInterrupt, and remembers them in `seen`.

    A library can turn the interrupt into another error. If the import of an extension module is interrupted, Python
    raises ImportError, and the module seems not to be installed.
    """

    def __init__(self) -> None:
        self.seen = False
        signal.signal(signal.SIGTERM, self._raise)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # keep an ignored SIGINT ignored
            signal.signal(signal.SIGINT, self._raise)

    def _raise(self, _signal: int, _frame: Any) -> None:
        self.seen = True
        raise KeyboardInterrupt


def explain(error: Exception) -> NoReturn:
    """Exit with one line for an error that the user can correct; raise any other error, which is a defect."""
    logging.getLogger(__name__).debug("where it happened", exc_info=error)
    usage = getattr(error, "format_message", None)
    if isinstance(error, NblError):
        fail(str(error), error.exit_code)
    if usage is not None:
        context = getattr(error, "ctx", None)  # of the subcommand that was called wrongly
        command = "nbl-export" if context is None else context.command_path
        fail(f"{usage().rstrip('.')}; see {command} --help", int(getattr(error, "exit_code", 2)))
    # torch has its own text; CPython raises SystemError if memory runs out in a call into C
    if isinstance(error, (MemoryError, SystemError)) or "can't allocate memory" in str(error):
        fail("out of memory; use a smaller --context, or a machine with more memory", 1)
    if isinstance(error, OSError) and error.strerror:
        fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 1)
    if isinstance(error, ValueError):
        fail(str(error), 1)
    raise error


def fail(message: str, status: int) -> NoReturn:
    said = " ".join(message.partition("Exception raised from ")[0].split())  # torch's C++ stack follows
    if len(said) > _LONGEST:  # for example a very long file name; the beginning and the advice at the end stay
        said = f"{said[: _LONGEST // 2]} ... {said[-_LONGEST // 2 :]}"
    sys.stderr.write(f"nbl-export: {visible(said)}\n")
    sys.exit(status)
