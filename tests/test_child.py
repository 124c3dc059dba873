"""A process of its own gets a function by its name, and answers in JSON."""

from __future__ import annotations

import dataclasses
import functools
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest

from nbl_export.child import Child, Write, _packed, _restored

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


def raw(write: Write, line: str) -> None:
    """What foreign code in the process may do: write to whatever is open."""
    for number in range(3, 64):
        try:
            os.write(number, line.encode())
        except OSError:
            continue
    write("end")


def test_answers_come_one_by_one_and_what_is_printed_is_none() -> None:
    total = functools.partial(Sizes.total, Sizes(Path("a"), (3, 4)))
    with Child(answers, 1, [None, 2.5], "text", total, Sizes(Path("a")).total) as child:
        assert [child.answer(60) for _ in range(6)] == [1, [None, 2.5], "text", 7, 3, None]
        assert child.status() == 0


def test_arguments_arrive_as_they_were() -> None:
    found = _restored(_packed([Path("p"), (1, (2,)), {1: "x"}, Sizes(Path("a"), (9,)), Sizes, Engine("n")]))
    assert found[:5] == [Path("p"), (1, (2,)), {1: "x"}, Sizes(Path("a"), (9,)), Sizes]
    assert vars(found[5]) == vars(Engine("n"))


def test_what_no_other_process_finds_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot be found by another process"):
        Child(answers, lambda: 1)


@pytest.mark.parametrize("line", ["{", "[" * 100_000, '{"name": "os:getcwd"}'])
def test_an_answer_is_data_alone(line: str) -> None:
    """A line that names a function is a value like others, and a line that is no JSON ends the answers."""
    with Child(raw, f"{line}\n") as child:
        found = child.answer(60)
    assert found == ({"name": "os:getcwd"} if "name" in line else None)


def test_a_child_that_says_nothing_is_ended() -> None:
    with Child(functools.partial(_sleep), grace=5) as child, pytest.raises(TimeoutError):
        child.answer(0.1)
    assert child.status() == -15


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
    import time

    time.sleep(600)
