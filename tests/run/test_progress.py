"""What a long stage says while it works."""

from __future__ import annotations

import io
import re

import pytest

from nbl_export.run import progress
from nbl_export.run.progress import Ui
from nbl_export.trust.terminal import Console


def test_plain_lines_are_sparse_and_say_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    said = io.StringIO()
    with Ui(Console(file=said)).task("65536 tokens") as update:
        for done in range(101):
            update(done, 100)
            now += 1.0
    lines = said.getvalue().splitlines()
    assert lines[0] == "  65536 tokens: 15%, about 85 s left"
    assert len(lines) == 100 // 15


def test_quiet_says_nothing_and_names_are_not_markup() -> None:
    said = io.StringIO()
    quiet = Ui(Console(file=said), quiet=True)
    quiet.say("a")
    with quiet.task("b") as update:
        update(1, 1)
    assert said.getvalue() == ""
    Ui(Console(file=said)).say("[red]run[/red]: done")
    assert re.fullmatch(r"\[red\]run\[/red\]: done\n", said.getvalue())
