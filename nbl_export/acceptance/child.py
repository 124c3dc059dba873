"""Runs a step in a process of its own, so that a crash inside a library is a failed step and not the end.

this process ── start ─► child: work(notes)
     ▲                     │  doing, saw, said ...      one by one, while the step works
     └──────── pipe ◄──────┘  ended                     its outcome; without it, the child has crashed
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbl_export.acceptance.verdict import (
    CannotRun,
    Emit,
    Failed,
    LeftOut,
    Notes,
    Outcome,
)
from nbl_export.errors import NblError
from nbl_export.parallel.child import GRACE_SECONDS, Child, Write

__all__ = ["LIMIT_SECONDS", "Task", "apart", "judged"]

LIMIT_SECONDS = 3600.0  # of a step; a GPU that hangs never answers
_GRACE_SECONDS = GRACE_SECONDS


@dataclass(frozen=True)
class Task:
    """The work of a step, which another process finds by its name, and what is said if it fails without saying more."""

    work: Callable[[Notes], None]
    layer: str
    advice: str


def judged(task: Task, emit: Emit) -> Outcome:
    """Run a task in this process. No error of a library gets out: it is a failed step."""
    try:
        task.work(Notes(emit))
    except CannotRun as error:
        return Outcome("cannot run", str(error))
    except LeftOut as error:
        return Outcome("left out", str(error))
    except Failed as error:
        return Outcome("failed", str(error), error.layer or task.layer, error.advice or task.advice)
    except NblError as error:
        return Outcome("failed", str(error), task.layer, task.advice)
    except Exception as error:  # a library of the GPU's may raise anything
        said = " ".join(str(error).split())[:500]
        return Outcome("failed", f"{type(error).__name__}: {said}" if said else type(error).__name__,
                       task.layer, task.advice)  # fmt: skip
    return Outcome("passed")


def apart(task: Task, heard: Emit, *, seconds: float = LIMIT_SECONDS) -> Outcome:
    """Run a task in a fresh process, which has ended on return, also after Ctrl-C.

    Args:
        heard: called with each event of the task, as it comes.
        seconds: the task is ended after this time.
    """
    last = "starting"
    deadline = time.monotonic() + seconds
    with Child(_child, task, grace=_GRACE_SECONDS) as child:
        while True:
            try:
                event = child.answer(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                said = f"the step did not end within {seconds:.0f} s; it hung while {last}"
                return Outcome("failed", said, task.layer, task.advice)
            if event is None:
                return Outcome("failed", f"{_end(child.status())} while {last}", task.layer, task.advice)
            kind, value = event
            if kind == "ended":
                return Outcome(*map(str, value))
            last = value if kind == "doing" else last
            heard(kind, value)


def _end(status: int) -> str:
    if status < 0:
        try:
            return f"the process was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"the process was ended by signal {-status}"
    return f"the process ended with status {status}"


def _child(write: Write, task: Task) -> None:
    signal.signal(signal.SIGTERM, _interrupt)  # so that children of a child are ended too

    def emit(kind: str, value: Any) -> None:
        write([kind, value])

    logging.getLogger().addHandler(_Sender(emit))
    with contextlib.suppress(KeyboardInterrupt):  # the parent has ended the step
        found = judged(task, emit)
        emit("ended", [found.verdict, found.said, found.layer, found.advice])


def _interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


class _Sender(logging.Handler):
    """Sends warnings of the libraries and of this project to the record."""

    def __init__(self, emit: Emit) -> None:
        super().__init__(logging.WARNING)
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:
        self._emit("said", " ".join(record.getMessage().split())[:500])
