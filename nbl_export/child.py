"""Runs a function of an installed module in a process of its own. Nothing that the process sends can name code.

    this process ── function and arguments, pickled ─► child      this process is trusted
         ▲                                               │
         └──────── one JSON text after the other ◄───────┘  write(value)  data alone, from any library's process

What the child's libraries print goes to stderr. The child never imports the script that the user started, nor modules
of the working directory. `multiprocessing` imports both, so its connection is used, and its processes are not.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any

from nbl_export.files import PACKAGE, parse_json

__all__ = ["Child", "Write", "main"]

Write = Callable[[Any], None]  # sends a JSON value to the parent

GRACE_SECONDS = 10.0  # for a child to end the processes that it has started
_MOST_BYTES = 64 << 20  # of an answer
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from nbl_export.child import main; main()"


class Child:
    """A process that calls `function(write, *given)`; it has ended when the context ends, also after Ctrl-C.

    Function and arguments are what `pickle` takes: values, functions and objects that a module names.
    """

    def __init__(self, function: Callable[..., None], *given: Any, grace: float | None = None) -> None:
        self._grace = GRACE_SECONDS if grace is None else grace
        self._request = (function, given)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Child:
        self._pipe, theirs = Pipe()
        path = [*sys.path, str(PACKAGE.parent)]
        number = theirs.fileno()
        command = [sys.executable, "-I", "-c", _START, json.dumps(path), str(number), str(os.getpid())]
        try:
            with theirs, _interrupts_held():
                self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[number])
            with contextlib.suppress(ConnectionError):  # a child that has ended is told by `answer`
                self._pipe.send(self._request)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(self._grace)
            except subprocess.TimeoutExpired:  # stuck inside a library, where Python handles no signal
                self._process.kill()
                self._process.wait()
        self._pipe.close()

    def answer(self, seconds: float | None = None) -> Any:
        """The next value that the child sends; None if it has ended, see `status`.

        Raises:
            TimeoutError: there is none within `seconds`.
        """
        try:
            came = self._pipe.poll(seconds)
            value = parse_json(self._pipe.recv_bytes(_MOST_BYTES)) if came else None
        except (EOFError, OSError, ValueError):
            self._pipe.close()  # a child that still writes ends
            return None
        if not came:
            raise TimeoutError
        return value

    def status(self) -> int:
        """The exit status of a child that has ended; the negative number of a signal."""
        assert self._process is not None
        return self._process.wait()

    def ending(self) -> str:
        """How a child ended that sent no answer, and what the ending usually means."""
        status = self.status()
        ended = f"ended with status {status}"
        if status >= 0:
            return ended
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        if name == "SIGKILL":
            return f"{ended} ({name}, usually too little memory: close other programs, or use a smaller precision)"
        return f"{ended} ({name}, a crash in a library that the engine uses: nbl-export doctor names the libraries)"


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold signals that end a run back until the block ends. A process started in the block never receives Ctrl-C.

    Ctrl-C is blocked in this thread alone. A thread of a library may take it, and Python's handler then runs here.
    """
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if main and signal.getsignal(n) is not None]
    handlers = {n: signal.signal(n, lambda number, _frame: came.append(number)) for n in numbers}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for held, handler in handlers.items():
            signal.signal(held, handler)
        for number in came:
            signal.raise_signal(number)


def _end_with(parent: int) -> None:
    """Have Linux end this process when its parent ends, also by a signal that no parent handles."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def main() -> None:
    """Read the request of the parent, and call its function."""
    _end_with(int(sys.argv[3]))
    pipe = Connection(int(sys.argv[2]))
    os.set_inheritable(pipe.fileno(), False)  # a process that a library starts does not hold the pipe open
    function, given = pipe.recv()
    turn = threading.Lock()  # a library may log from a thread of its own

    def write(value: Any) -> None:
        with turn:
            pipe.send_bytes(json.dumps(value).encode())

    with contextlib.suppress(ConnectionError):
        function(write, *given)
    sys.stderr.flush()
    os._exit(0)  # without the clean-up of libraries, which can wait for a GPU
