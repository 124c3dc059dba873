"""Runs a function of an installed module in a process of its own. Nothing that the process sends can name code.

    this process ── {"name": "module:function"}, arguments ─► child's stdin      this process is trusted
         ▲                                                      │
         └──────── one line of JSON after the other ◄───────────┘  write(value)  data alone, from any library's process

Functions, methods, paths, tuples, and objects by class and attributes can be arguments. What the child's libraries
print goes to stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

from nbl_export.files import PACKAGE

__all__ = ["Child", "Write", "main", "readable"]

Write = Callable[[Any], None]  # sends a JSON value to the parent

GRACE_SECONDS = 10.0  # for a child to end the processes that it has started
_MOST_BYTES = 64 << 20  # of an answer
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from nbl_export.child import main; main()"


class Child:
    """A process that calls `function(write, *given)`; it has ended when the context ends, also after Ctrl-C.

    Raises:
        TypeError: an argument is nothing that can be sent.
    """

    def __init__(self, function: Callable[..., None], *given: Any, grace: float | None = None) -> None:
        self._grace = GRACE_SECONDS if grace is None else grace
        self._request = json.dumps(_packed([function, *given])).encode()
        self._waiting = bytearray()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Child:
        path = [*sys.path, str(PACKAGE.parent)]
        command = [sys.executable, "-I", "-c", _START, json.dumps(path)]
        try:
            with _interrupts_held():
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert self._process.stdin is not None and self._process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # a child that has ended is told by `answer`
                self._process.stdin.write(self._request)
                self._process.stdin.close()
            self._answers = self._process.stdout.fileno()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(self._grace)
        except subprocess.TimeoutExpired:  # stuck inside a library, where Python handles no signal
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def answer(self, seconds: float | None = None) -> Any:
        """The next value that the child sends; None if it has ended, see `status`.

        Raises:
            TimeoutError: there is none within `seconds`.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._waiting:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not readable(self._answers, left):
                raise TimeoutError
            piece = os.read(self._answers, 1 << 16)
            self._waiting += piece
            if not piece or len(self._waiting) > _MOST_BYTES:
                return None
        line, _, rest = bytes(self._waiting).partition(b"\n")
        self._waiting = bytearray(rest)
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            return None

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


def readable(descriptor: int, seconds: float | None) -> bool:
    """Wait until something can be read, or for so long. A descriptor may have any number."""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(seconds))


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold signals that end a run back until the block ends. A process started in the block never receives Ctrl-C.

    Ctrl-C is blocked in this thread alone. A thread of a library may take it, and Python's handler then runs here.
    """
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if main and signal.getsignal(n) is not None]
    handlers = {n: signal.signal(n, lambda number, _frame: came.append(number)) for n in numbers}
    blocks = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if blocks else set()
    try:
        yield
    finally:
        if blocks:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for held, handler in handlers.items():
            signal.signal(held, handler)
        for number in came:
            signal.raise_signal(number)


def main() -> None:
    """Read the request, and call its function."""
    function, *given = _restored(json.loads(sys.stdin.buffer.read()))
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="ascii")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    turn = threading.Lock()  # a library may log from a thread of its own

    def write(value: Any) -> None:
        line = json.dumps(value)
        with turn:
            out.write(line + "\n")
            out.flush()

    with contextlib.suppress(BrokenPipeError):
        function(write, *given)
    sys.stderr.flush()
    os._exit(0)  # without the clean-up of libraries, which can wait for a GPU


def _packed(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list):
        return [_packed(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_packed(item) for item in value]}
    if isinstance(value, dict):
        return {"pairs": [[_packed(key), _packed(item)] for key, item in value.items()]}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, frozenset):
        return {"set": sorted(map(_packed, value))}
    if isinstance(value, FunctionType | type | functools._lru_cache_wrapper):
        return {"name": _name_of(value)}
    if isinstance(value, MethodType):
        return {"method": value.__name__, "of": _packed(value.__self__)}
    if isinstance(value, functools.partial):
        return {"partial": _packed([value.func, list(value.args), value.keywords])}
    if dataclasses.is_dataclass(value):
        state = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        state = vars(value)
    return {"object": _name_of(type(value)), "state": {name: _packed(item) for name, item in state.items()}}


def _name_of(value: Any) -> str:
    name = f"{value.__module__}:{value.__qualname__}"
    if "<" in name or value.__module__ == "__main__":
        raise TypeError(f"{name} cannot be found by another process")
    return name


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(map(_restored, value["tuple"]))
    if "pairs" in value:
        return {_restored(key): _restored(item) for key, item in value["pairs"]}
    if "path" in value:
        return Path(value["path"])
    if "set" in value:
        return frozenset(value["set"])
    if "name" in value:
        return _found(value["name"])
    if "method" in value:
        return getattr(_restored(value["of"]), value["method"])
    if "partial" in value:
        function, given, named = _restored(value["partial"])
        return functools.partial(function, *given, **named)
    kind = _found(value["object"])
    made = kind.__new__(kind)
    for name, item in value["state"].items():
        object.__setattr__(made, name, _restored(item))
    return made


def _found(name: str) -> Any:
    module, _, path = name.partition(":")
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))
