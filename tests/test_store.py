"""Artefacts of tests: made once, made anew if a file is not as it was left."""

from __future__ import annotations

import os
from pathlib import Path

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


def test_the_key_of_sources_changes_with_each_of_them() -> None:
    assert len({key_of("tests/tiny.py"), key_of("tests/tiny.toml"), key_of("tests/tiny.py", "tests/tiny.toml")}) == 3
    assert key_of("nbl_export/text") != key_of("nbl_export/trust")
