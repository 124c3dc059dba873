"""`nbl-export` in a child that may die, with bounds on time and memory, and a watch on what it must not touch.

Memory is judged by what is resident. A limit of the address space would turn an allocation without bound into an error
that the command tells in one sentence, where the system of a user would end the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import resource
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

from .command import Outcome, nbl

__all__ = ["MOST_BYTES", "Sandbox", "watched"]

_SECONDS = 60.0
MOST_BYTES = 1500 << 20  # resident, beside what the process takes before a command
_LOOK_SECONDS = 0.02
_CALLS = 250  # of one child: what it remembers of earlier ones must not decide


class Sandbox:
    """Runs commands one after the other in a forked child; a new one where it died. A context manager.

    count: commands that were run. largest: the most bytes that one of them took, beside what was there before it.
    """

    def __init__(self) -> None:
        self._child: Any = None
        self._pipe: Any = None
        self._calls = self.count = self.largest = 0

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, *arguments: object, place: Path) -> Outcome:
        """Run a command in the directory `place`.

        Status as of subprocess: minus the signal where one ended it; -9 after `_SECONDS`, or above `MOST_BYTES`.
        """
        if self._child is None or self._calls == _CALLS:
            self._end()
            self._start()
        self._calls, self.count = self._calls + 1, self.count + 1
        before = _forget_peak(self._child.pid)
        self._pipe.send((str(place), [str(a) for a in arguments]))
        until = time.monotonic() + _SECONDS
        while not self._pipe.poll(_LOOK_SECONDS):
            if time.monotonic() > until:
                self._end()
                return Outcome(-9, "", f"no end after {_SECONDS:.0f} s")
            if self._took(before, 0) > MOST_BYTES:
                self._end()
                return Outcome(-9, "", f"more than {MOST_BYTES >> 20} MiB of memory")
        try:
            *said, children = self._pipe.recv()
            if self._took(before, children) > MOST_BYTES:
                return Outcome(-9, "", f"more than {MOST_BYTES >> 20} MiB of memory")
            return Outcome(*said)
        except EOFError:
            self._child.join()
            status = self._child.exitcode
            self._end()
            return Outcome(status, "", "the process died")

    def _took(self, before: int, children: int) -> int:
        # Linux counts what a process holds when it starts a child as the peak of that child too.
        took = max(_memory(self._child.pid, "VmHWM"), children) - before
        self.largest = max(self.largest, took)
        return took

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, other = context.Pipe()
        self._child = context.Process(target=_serve, args=(other, self._pipe))
        self._child.start()
        other.close()
        self._calls = 0

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.join()
            self._pipe.close()
        self._child = None


def _memory(process: int, name: str) -> int:
    """Resident bytes: VmRSS now, VmHWM at most; 0 of a process that has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return 0


def _forget_peak(process: int) -> int:
    """Resident bytes now; the peak begins anew (proc(5), clear_refs)."""
    Path(f"/proc/{process}/clear_refs").write_text("5")
    return _memory(process, "VmRSS")


def _serve(pipe: Any, of_parent: Any) -> None:
    of_parent.close()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.freeze()  # what the parent made is not looked through after every call
    with tempfile.TemporaryFile() as said:  # libraries in C++ write to the descriptor
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        while True:
            try:
                place, arguments = pipe.recv()
            except EOFError:
                return
            logging.getLogger().handlers.clear()  # or what the tool logs would go to pytest
            os.chdir(place)
            children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            done = nbl(*arguments)
            os.chdir("/")
            larger = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            said.seek(0)
            noise = said.read().decode(errors="replace")
            said.seek(0)
            said.truncate()
            pipe.send((done.status, done.out, done.err + noise, larger << 10 if larger > children else 0))
            gc.collect()


class watched:
    """Within: `seen()` names what any process opened, made or removed in directories since the last call (inotify)."""

    _EVENTS = 0x20 | 0x100 | 0x200 | 0x2 | 0x40 | 0x80  # IN_OPEN, CREATE, DELETE, MODIFY, MOVED_FROM, MOVED_TO

    def __init__(self, *directories: Path) -> None:
        self._directories = directories

    def __enter__(self) -> watched:
        libc = ctypes.CDLL(None, use_errno=True)
        self._watch = libc.inotify_init1(os.O_NONBLOCK)
        for directory in self._directories:
            if libc.inotify_add_watch(self._watch, os.fsencode(directory), self._EVENTS) < 0:
                raise OSError(ctypes.get_errno(), "inotify is not to be had")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._watch)

    def seen(self) -> list[str]:
        names = []
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._watch, 65536):
                at = 0
                while at < len(data):
                    length = struct.unpack_from("iIII", data, at)[3]
                    names.append(os.fsdecode(data[at + 16 : at + 16 + length].rstrip(b"\0")))
                    at += 16 + length
        return names
