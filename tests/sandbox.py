"""`nbl-export` in a child that may die, with bounds on time and memory, and a watch on what it must not touch.

Memory is judged by what is resident. A limit of the address space would turn an allocation without bound into an error
that the command tells in one sentence, where the system of a user would end the process. Time is judged by what the
processor spent, so that a busy machine changes no verdict. A connection is refused, and named.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import logging
import multiprocessing
import os
import re
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from huggingface_hub import constants

from nbl_export.model import processes

from .command import Outcome, nbl

__all__ = ["MOST_BYTES", "MOST_SECONDS", "Sandbox", "watched"]

_SECONDS = 300.0  # of waiting; a busy machine takes long for a GiB
MOST_SECONDS = 20.0  # of the processor
MOST_BYTES = 1 << 30  # resident, beside what the process takes before a command
_LOOK_SECONDS = 0.02
_CALLS = 250  # of one child: what it remembers of earlier ones must not decide


class Sandbox:
    """Runs commands one after the other in a forked child; a new one where it died. A context manager.

    took: of each command, its inputs, the most bytes that one took beside what was there before it, and seconds of the
    processor: the most, and of all. connections: what the last input would have talked to.
    """

    def __init__(self) -> None:
        self._child: Any = None
        self._pipe: Any = None
        self._calls = self._largest = 0
        self.took: dict[str, tuple[int, int, float, float]] = {}
        self.connections = list[str]()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, *arguments: object, place: Path) -> Outcome:
        """Run a command in the directory `place`; its home and its scratch files are in `home` and `temporary` beside.

        A word NAME=value becomes a variable of the environment.
        Status as of subprocess: minus the signal where one ended it; -9 above `MOST_SECONDS` or `MOST_BYTES`.
        """
        if self._child is None or self._calls == _CALLS:
            self._end()
            self._start()
        self._calls, self._largest, self.connections = self._calls + 1, 0, []
        done, spent = self._run(place, [str(a) for a in arguments])
        name = "main" if str(arguments[0]).startswith("--") else str(arguments[0])
        count, most, longest, seconds = self.took.get(name, (0, 0, 0.0, 0.0))
        self.took[name] = count + 1, max(most, self._largest), max(longest, spent), seconds + spent
        return done

    def _run(self, place: Path, arguments: list[str]) -> tuple[Outcome, float]:
        """Also the seconds of the processor."""
        before = _forget_peak(self._child.pid)
        self._pipe.send((str(place), arguments))
        until, began = time.monotonic() + _SECONDS, _spent(self._child.pid)
        while not self._pipe.poll(_LOOK_SECONDS):
            if time.monotonic() > until or _spent(self._child.pid) - began > MOST_SECONDS:
                self._end()
                end = f"no end after {MOST_SECONDS:.0f} s of work, or {_SECONDS:.0f} s"
                return Outcome(-9, "", end), MOST_SECONDS
            if self._took(before, 0) > MOST_BYTES:
                self._end()
                return Outcome(-9, "", f"more than {MOST_BYTES >> 20} MiB of memory"), 0.0
        try:
            *said, children, self.connections = self._pipe.recv()
            spent = _spent(self._child.pid) - began
            if self._took(before, children) > MOST_BYTES:
                return Outcome(-9, "", f"more than {MOST_BYTES >> 20} MiB of memory"), spent
            return Outcome(*said), spent
        except EOFError:
            self._child.join()
            status = self._child.exitcode
            self._end()
            return Outcome(status, "", "the process died"), 0.0

    def _took(self, before: int, children: int) -> int:
        # Linux counts what a process holds when it starts a child as the peak of that child too. Resident pages of
        # files may go while a command works, so what is there after the command counts if it is less.
        least = min(before, _memory(self._child.pid, "VmRSS") or before)
        took = max(_memory(self._child.pid, "VmHWM"), children) - least
        self._largest = max(self._largest, took)
        return took

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, other = context.Pipe()
        self._child = context.Process(target=_serve, args=(other, self._pipe))
        self._child.start()
        other.close()
        self._pipe.recv()  # it is ready
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


def _spent(process: int) -> float:
    """Seconds of the processor, of a process and of the children that it has waited for; 0 after its end."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _forget_peak(process: int) -> int:
    """Resident bytes now; the peak begins anew (proc(5), clear_refs)."""
    Path(f"/proc/{process}/clear_refs").write_text("5")
    return _memory(process, "VmRSS")


def _serve(pipe: Any, of_parent: Any) -> None:
    of_parent.close()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connections: list[str] = []
    sys.addaudithook(functools.partial(_refuse_connections, connections))
    constants.HF_HUB_OFFLINE = False  # or the libraries would not try
    gc.freeze()  # what the parent made is not looked through after every call
    with tempfile.TemporaryFile() as said:  # libraries in C++ write to the descriptor
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        _give_back()
        pipe.send(None)
        while True:
            try:
                place, arguments = pipe.recv()
            except EOFError:
                return
            logging.getLogger().handlers.clear()  # or what the tool logs would go to pytest
            os.chdir(place)
            tempfile.tempdir = os.environ["TMPDIR"] = f"{Path(place).parent}/temporary"
            os.environ["HOME"], os.environ["XDG_CACHE_HOME"] = (
                f"{Path(place).parent}/home{x}" for x in ("", "/.cache")
            )
            connections.clear()
            children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            variables = dict(word.split("=", 1) for word in arguments if re.match("[A-Z_]+=", word))
            with mock.patch.dict(os.environ, variables):
                done = nbl(*(word for word in arguments if not re.match("[A-Z_]+=", word)))
            processes._threads.clear()
            os.chdir("/")
            larger = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            said.seek(0)
            noise = said.read().decode(errors="replace")
            said.seek(0)
            said.truncate()
            took = larger << 10 if larger > children else 0
            _give_back()
            pipe.send((done.status, done.out, done.err + noise, took, [*connections]))


def _give_back() -> None:
    """Free memory goes back to the system: else a command that gives it back would seem to have taken it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _refuse_connections(found: list[str], event: str, given: tuple[Any, ...]) -> None:
    """An audit hook: names of hosts and addresses that Python asks for, in this process."""
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(given[1], tuple)):
        found.append(str(given[0] if event == "socket.getaddrinfo" else given[1]))
        raise ConnectionRefusedError("no network here")


@functools.cache
def _inotify() -> tuple[int, Any]:
    """One descriptor for all: to close one takes the kernel 10 ms."""
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.inotify_init1(os.O_NONBLOCK), libc


class watched:
    """Within: `seen()` names what any process opened, made or removed in directories since the last call (inotify)."""

    _EVENTS = 0x20 | 0x100 | 0x200 | 0x2 | 0x40 | 0x80  # IN_OPEN, CREATE, DELETE, MODIFY, MOVED_FROM, MOVED_TO

    def __init__(self, *directories: Path) -> None:
        self._directories = directories

    def __enter__(self) -> watched:
        self._watch, libc = _inotify()
        self._marks = [libc.inotify_add_watch(self._watch, os.fsencode(d), self._EVENTS) for d in self._directories]
        if min(self._marks) < 0:
            raise OSError(ctypes.get_errno(), "inotify is not to be had")
        self.seen()  # of directories that were watched before
        return self

    def __exit__(self, *_: object) -> None:
        for mark in self._marks:
            _inotify()[1].inotify_rm_watch(self._watch, mark)

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
