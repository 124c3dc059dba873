"""Runs a step in a process of its own, so that a crash inside a library is a failed step and not the end.

this process ── spawn ─► child: work(notes)
     ▲                     │  doing, saw, said ...      one by one, while the step works
     └──────── pipe ◄──────┘  ended                     its outcome; without it, the child has crashed
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from nbl_export.acceptance.verdict import CannotRun, Emit, Failed, LeftOut, Notes, Outcome
from nbl_export.errors import NblError
from nbl_export.measure.footprint import _interrupts_held

__all__ = ["LIMIT_SECONDS", "Task", "apart", "judged"]

LIMIT_SECONDS = 3600.0  # of a step; a GPU that hangs never answers
_GRACE_SECONDS = 10.0  # for a child to end the processes that it has started


@dataclass(frozen=True)
class Task:
    """The work of a step, picklable, and what is said if it fails without saying more.

    Attributes:
        children: whether the work starts processes of its own.
    """

    work: Callable[[Notes], None]
    layer: str
    advice: str
    children: bool = False


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
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(there, task), daemon=not task.children)
    resource_tracker.ensure_running()  # starting it inside the block below would unblock interrupts
    with _interrupts_held():
        child.start()
    there.close()  # only the child's copy stays open, so the child's end also ends the wait
    last = "starting"
    deadline = time.monotonic() + seconds
    try:
        while True:
            if not here.poll(max(0.0, deadline - time.monotonic())):
                said = f"the step did not end within {seconds:.0f} s; it hung while {last}"
                return Outcome("failed", said, task.layer, task.advice)
            kind, value = here.recv()
            if kind == "ended":
                return Outcome(*value)
            last = value if kind == "doing" else last
            heard(kind, value)
    except EOFError:
        child.join()
        return Outcome("failed", f"{_end(child.exitcode)} while {last}", task.layer, task.advice)
    finally:
        here.close()
        child.terminate()
        child.join(_GRACE_SECONDS)
        if child.is_alive():  # stuck inside a library, where Python handles no signal
            child.kill()
        child.join()


def _end(status: int | None) -> str:
    if status is not None and status < 0:
        try:
            return f"the process was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"the process was ended by signal {-status}"
    return f"the process ended with status {status}"


def _child(out: Connection, task: Task) -> None:
    signal.signal(signal.SIGTERM, _interrupt)  # so that children of a child are ended too
    turn = threading.Lock()  # a library may log from a thread of its own

    def emit(kind: str, value: Any) -> None:
        with turn:
            out.send((kind, value))

    logging.getLogger().addHandler(_Sender(emit))
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):  # the parent has ended the step
        found = judged(task, emit)
        emit("ended", (found.verdict, found.said, found.layer, found.advice))


def _interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


class _Sender(logging.Handler):
    """Sends warnings of the libraries and of this project to the record."""

    def __init__(self, emit: Emit) -> None:
        super().__init__(logging.WARNING)
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:
        self._emit("said", " ".join(record.getMessage().split())[:500])
