"""Artefacts of tests: made once, made anew if a file is not as it was left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .store import Store, key_of


def test_an_artefact_is_made_once_and_anew_if_it_was_changed(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "a").write_text("one")

    store = Store(tmp_path, "key")
    folder = store.get("x", make)
    assert store.get("x", make) == Store(tmp_path, "key").get("x", make) == folder
    assert len(made) == 1 and store.written() == {}
    (folder / "b").write_text("two")
    assert store.written() == {"x": ["b"]}
    assert Store(tmp_path, "key").get("x", make) == folder and len(made) == 2
    assert sorted(os.listdir(folder)) == ["a"]


def test_an_artefact_that_could_not_be_made_is_made_anew(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise ZeroDivisionError

    store = Store(tmp_path, "key")
    with pytest.raises(ZeroDivisionError):
        store.get("x", fail)
    folder = store.get("x", lambda folder: (folder / "a").touch())
    assert os.listdir(folder) == ["a"]


def test_a_key_that_nobody_used_for_a_day_is_removed(tmp_path: Path) -> None:
    for key, age_s in (("old", 90_000), ("new", 80_000)):
        Store(tmp_path, key)
        before = (tmp_path / key / "used").stat().st_mtime - age_s
        os.utime(tmp_path / key / "used", (before, before))
    Store(tmp_path, "mine")
    assert sorted(os.listdir(tmp_path)) == ["mine", "new"]


def test_the_key_of_sources_changes_with_each_of_them() -> None:
    assert len({key_of("tests/tiny.py"), key_of("tests/tiny.toml"), key_of("tests/tiny.py", "tests/tiny.toml")}) == 3
    assert key_of("nbl_export/text") != key_of("nbl_export/trust")
