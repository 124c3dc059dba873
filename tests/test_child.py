"""A process of its own gets a function by its name, and answers in JSON."""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from nbl_export.child import Child, Write

pytestmark = pytest.mark.process


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A record with a default that was changed."""

    path: Path
    pair: tuple[int, ...] = (1, 2)

    def total(self) -> int:
        return sum(self.pair)


class Engine:
    """An object that is no record."""

    def __init__(self, name: str) -> None:
        self.name, self.sizes = name, {1: Sizes(Path("b"))}


def answers(write: Write, *given: Any) -> None:
    os.write(sys.stdout.fileno(), b"a library speaks\n")
    for value in given:
        write(value() if callable(value) else value)


def describe(write: Write, found: list[Any]) -> None:
    write([repr(found[:5]), repr(vars(found[5]))])


def raw(write: Write, message: bytes) -> None:
    """What foreign code in the process may do: write to whatever is open."""
    for number in range(3, 64):
        try:
            os.write(number, message)
        except OSError:
            continue
    for _ in range(1000):  # more than the pipe holds: a process that nobody reads must end
        write("x" * 1000)


def test_answers_come_one_by_one_and_what_is_printed_is_none() -> None:
    total = functools.partial(Sizes.total, Sizes(Path("a"), (3, 4)))
    with Child(answers, 1, [None, 2.5], "text", total, Sizes(Path("a")).total) as child:
        assert [child.answer(60) for _ in range(6)] == [1, [None, 2.5], "text", 7, 3, None]
        assert child.status() == 0


def test_arguments_arrive_as_they_were() -> None:
    given = [Path("p"), (1, (2,)), {1: "x"}, Sizes(Path("a"), (9,)), Sizes, Engine("n")]
    with Child(describe, given) as child:
        assert child.answer(60) == [repr(given[:5]), repr(vars(given[5]))]


def test_what_no_other_process_finds_is_refused() -> None:
    child = Child(answers, lambda: 1)
    with pytest.raises(AttributeError, match="lambda"), child:
        pass
    assert child.status() != 0


def framed(payload: bytes) -> bytes:
    return struct.pack("!i", len(payload)) + payload


@pytest.mark.parametrize(
    ("message", "value"),
    [
        (framed(b'{"name": "os:getcwd"}'), {"name": "os:getcwd"}),
        (framed(b"{"), None),
        (framed(b"[" * 100_000), None),
        (framed(pickle.dumps(os.getcwd)), None),
        (struct.pack("!i", (64 << 20) + 1), None),
        (struct.pack("!i", -2), None),
        (struct.pack("!iQ", -1, 1 << 62), None),
    ],
    ids=["names a function", "no JSON", "deep", "a pickle", "too long", "negative length", "64-bit length"],
)
def test_an_answer_is_data_alone(message: bytes, value: Any) -> None:
    """A message that names a function is a value like others. What is no JSON, or too long, ends child and answers."""
    with Child(raw, message) as child:
        assert child.answer(60) == value
        if value is None:
            assert child.answer(60) is None
            assert child.status() == 0


def test_a_script_without_a_guard_runs_once_and_the_working_directory_is_not_imported(tmp_path: Path) -> None:
    """`multiprocessing` runs the script again in its process, and imports itself from the working directory."""
    (tmp_path / "elsewhere").mkdir()
    for name in ("json", "multiprocessing", "pickle", "socket"):
        (tmp_path / "elsewhere" / f"{name}.py").write_text(f"import os; os.write(2, b'imported {name}')")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.append({str(Path(__file__).parents[1])!r})\n"
        "print('ran')\n"
        "from nbl_export.child import Child\n"
        "from tests.test_child import answers\n"
        "with Child(answers, 1) as child:\n"
        "    print(child.answer(60))\n"
    )
    held = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", env=held, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("ran\n1\n", "a library speaks\n")


def test_a_child_that_says_nothing_is_ended() -> None:
    with Child(functools.partial(_sleep), grace=5) as child, pytest.raises(TimeoutError):
        child.answer(0.1)
    assert child.status() == -15


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell a process nothing")
def test_a_child_ends_with_a_parent_that_is_killed() -> None:
    script = (
        "from nbl_export.child import Child\n"
        "from tests.test_child import _says_its_number\n"
        "with Child(_says_its_number) as child:\n"
        "    print(child.answer(60), flush=True)\n"
        "    child.answer(600)\n"
    )
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=where) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert _works(child)
        parent.kill()
    end = time.monotonic() + 10
    while _works(child) and time.monotonic() < end:
        time.sleep(0.01)
    left = _works(child)
    if left:
        child.kill()
    assert not left


def _works(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE  # of which a container may keep some


def test_a_process_with_thousands_of_open_files_hears_its_child() -> None:
    """select() takes no descriptor above 1,023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1_200:
        pytest.skip("the limit of open files is too low")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1_200), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1_024)]
    try:
        with Child(answers, 1) as child:
            assert child.answer(60) == 1
    finally:
        for number in opened:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _sleep(_write: Write) -> None:
    time.sleep(600)


def _says_its_number(write: Write) -> None:
    write(os.getpid())
    time.sleep(600)
