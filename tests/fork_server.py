"""`nbl-export` in forks of one process that has loaded the libraries: for tests that kill it many times.

with ForkServer(tmp_path) as server:
    run = server.start("--model", ...)       # a process of its own
    run.wait_for("bench ...")                # a line on its stderr
    run.kill()
    run.status                               # minus the signal, as in subprocess
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

__all__ = ["ForkServer", "ForkedRun"]

_PATIENCE_SECONDS = 120.0
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class ForkedRun:
    """One run, in a process group of its own."""

    def __init__(self, server: subprocess.Popen[str], arguments: list[str], code: str, log: Path) -> None:
        assert server.stdin is not None
        assert server.stdout is not None
        self._server, self._log = server, log
        log.write_text("")
        print(json.dumps([arguments, code, str(log)]), file=server.stdin, flush=True)
        said, number = server.stdout.readline().split()
        assert said == "pid", said
        self.pid = int(number)

    @property
    def err(self) -> str:
        """What it said on stderr so far."""
        return self._log.read_text(encoding="utf-8")

    def wait_for(self, line: str) -> bool:
        """Wait for the start of a line on stderr; False if the process ends without it."""
        end = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < end:
            gone = not _is_running(self.pid)
            if any(said.startswith(line) for said in self.err.splitlines()):
                return True
            if gone:
                return False
            time.sleep(0.001)
        raise TimeoutError(f"{line!r} never came: {self.err}")

    def poll(self) -> int | None:
        """None while it runs, as in subprocess; the status afterwards."""
        return None if "status" not in vars(self) and _is_running(self.pid) else self.status

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the whole group, as a terminal does. Nothing once the end was waited for."""
        if "status" in vars(self):
            return
        end = time.monotonic() + _PATIENCE_SECONDS
        with contextlib.suppress(ProcessLookupError):
            while os.getpgid(self.pid) != self.pid and time.monotonic() < end:
                time.sleep(0.001)  # it has not made its group yet
            os.killpg(self.pid, number)

    @functools.cached_property
    def status(self) -> int:
        """Wait for the end. Exit status, or minus the signal that ended it.

        A run that never ends is killed and fails its test: a library can lose the exception of Ctrl-C.
        """
        assert self._server.stdout is not None
        if not wait([self._server.stdout.fileno()], _PATIENCE_SECONDS):
            os.killpg(self.pid, signal.SIGKILL)
        said, number = self._server.stdout.readline().split()
        assert said == "status", said
        return int(number)


def _is_running(pid: int) -> bool:
    """False for a process that has ended, waited for or not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class ForkServer:
    """A context manager; one run at a time: a new one ends the one before."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._runs: list[ForkedRun] = []

    def __enter__(self) -> ForkServer:
        command = [sys.executable, "-m", "tests.fork_server", str(os.getpid())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
            start_new_session=True,  # no signal of a test reaches the group of the tests
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._end_last()
        self._process.communicate()

    def start(self, *arguments: object, code: str = "") -> ForkedRun:
        """Start `nbl-export ARGUMENTS`, after running `code`, in a fork."""
        self._end_last()
        log = self._logs / f"stderr-{len(self._runs)}"
        self._runs.append(ForkedRun(self._process, [str(a) for a in arguments], code, log))
        return self._runs[-1]

    def _end_last(self) -> None:
        if self._runs and "status" not in vars(self._runs[-1]):
            self._runs[-1].kill()
            self._runs[-1].status  # noqa: B018  waits


def _serve() -> None:
    """For each line on stdin: fork, say the process id, wait, say the status."""
    server = os.getpid()
    for line in sys.stdin:
        arguments, code, log = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(server, arguments, code, log)
        _tell("pid", pid)
        _tell("status", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _tell(what: str, number: int) -> None:
    sys.stdout.write(f"{what} {number}\n")
    sys.stdout.flush()


def _end_with(parent: int) -> None:
    """If the tests are killed, a run that only a signal ends must not go on for ever."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _become(server: int, arguments: list[str], code: str, log: str) -> None:
    from nbl_export.cli.app import main

    os.setsid()
    _end_with(server)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may be a background job, which ignores it
    for number, target in ((0, os.devnull), (1, os.devnull), (2, log)):
        os.dup2(os.open(target, os.O_RDWR), number)
    sys.argv = ["nbl-export", *arguments]
    exec(code, {})
    try:
        main()
    except SystemExit as end:  # without the libraries' own end, which waits for threads that no fork has
        sys.stderr.flush()
        os._exit(int(end.code or 0))


if __name__ == "__main__":
    _end_with(int(sys.argv[1]))
    # Whatever takes long to load. Transformers loads its parts, and torch, when a name is asked for.
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import nbl_export.methods.rewrite
    import nbl_export.report.page
    import nbl_export.run.pipeline  # noqa: F401
    from tests.command import shorten_parts

    shorten_parts()
    _serve()
