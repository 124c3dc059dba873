"""How a command ends: its result, or the one line that says why there is none, and the exit status."""

from __future__ import annotations

import json
import logging
import signal
import sys
from typing import Any, NoReturn

from nbl_export.errors import NblError
from nbl_export.terminal import Console, visible

__all__ = ["GOES_ON", "INTERRUPTED", "Interrupts", "explain", "fail", "show"]

INTERRUPTED = 130
_LONGEST = 1000  # characters of an error
GOES_ON = "interrupted; finished stages are kept, the same command goes on from there"


class Interrupts:
    """Signals that end the run: KeyboardInterrupt, and a note of it for where a library makes another error of that.

    An extension module whose import is interrupted says ImportError, and looks as if it were not installed.
    """

    def __init__(self) -> None:
        self.seen = False
        signal.signal(signal.SIGTERM, self._raise)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
            signal.signal(signal.SIGINT, self._raise)

    def _raise(self, _signal: int, _frame: Any) -> None:
        self.seen = True
        raise KeyboardInterrupt


def show(value: Any, table: Any, as_json: bool) -> None:
    """A result on stdout: the value as JSON, or its table."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=1) + "\n")
    else:
        Console(width=None if sys.stdout.isatty() else 110).print(table)


def explain(error: Exception) -> NoReturn:
    """What the user can act on ends as one line; anything else is a defect and shows."""
    logging.getLogger(__name__).debug("where it happened", exc_info=error)
    usage = getattr(error, "format_message", None)
    if isinstance(error, NblError):
        fail(str(error), error.exit_code)
    if usage is not None:
        fail(f"{usage().rstrip('.')}; see nbl-export --help", int(getattr(error, "exit_code", 2)))
    # torch's own words for it; and what CPython makes of one in the middle of a call into C
    if isinstance(error, (MemoryError, SystemError)) or "can't allocate memory" in str(error):
        fail("out of memory; use a smaller --context, or a machine with more memory", 1)
    if isinstance(error, OSError) and error.strerror:
        fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 1)
    if isinstance(error, ValueError):
        fail(str(error), 1)
    raise error


def fail(message: str, status: int) -> NoReturn:
    said = " ".join(message.partition("Exception raised from ")[0].split())  # behind that, torch's stack in C++
    if len(said) > _LONGEST:  # a name of thousands of characters, say: what happened, and what to do about it
        said = f"{said[: _LONGEST // 2]} ... {said[-_LONGEST // 2 :]}"
    sys.stderr.write(f"nbl-export: {visible(said)}\n")
    sys.exit(status)
