"""A user of an option or command that left gets one sentence that says what to use."""

from __future__ import annotations

import pytest

from nbl_export.errors import UsageError
from nbl_export.options.options import LEFT, OPTIONS
from nbl_export.options.settle import read_asked

from ..command import nbl


@pytest.fixture(autouse=True)
def _gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEFT, "old_way", "use --layers")


def test_the_command_line_says_what_to_use_instead() -> None:
    for words in (("--old-way", "3"), ("--old-way=3",)):
        said = nbl("--model", "m", *words, "--output", "out")
        assert said.status == 2
        assert said.err == "nbl-export: --old-way is gone: use --layers\n"
    assert nbl("old_way", "run").err == "nbl-export: old_way is gone: use --layers\n"


def test_configurations_and_python_say_it_too() -> None:
    with pytest.raises(UsageError, match=r"^--old-way is gone: use --layers$"):
        read_asked({"old-way": 3})


def test_what_left_is_no_option() -> None:
    assert not LEFT.keys() & OPTIONS.keys()
