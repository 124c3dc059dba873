"""Hashes of large files: of every byte, and remembered only where nobody else could have written them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbl_export.model.checkpoint import source as checkpoints
from nbl_export.trust import user_lists
from nbl_export.trust.user_lists import cache_file, sha256_of

from ..damage import flip

WRONG = "0" * 64


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A cache of its own that keeps files of any size, and the names of the files that were read."""
    names: list[str] = []
    correct = user_lists.file_sha256

    def counted(path: Path) -> str:
        names.append(path.name)
        return correct(path)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(user_lists, "_KEPT_BYTES", 0)
    monkeypatch.setattr(user_lists, "_SETTLED_SECONDS", -1000.0)
    monkeypatch.setattr(user_lists, "file_sha256", counted)
    return names


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 100)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


READ = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.json",
        "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja",
        "additional_chat_templates/tools.jinja", "tekken.json", "more.safetensors",
        "model.safetensors.index.json")  # fmt: skip


def test_every_byte_that_a_loader_may_read_identifies_the_model(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(checkpoint("llama"), tmp_path / "m"))
    for name in READ:
        file = copy / name
        file.parent.mkdir(exist_ok=True)
        if name == "model.safetensors.index.json":
            file.write_text('{"weight_map": {"of.no.use": "model.safetensors"}} ', encoding="utf-8")
        elif not file.exists():
            file.write_bytes((copy / "model.safetensors").read_bytes() if name.endswith("rs") else b"{} ")
    first = checkpoints.resolve(str(copy)).fingerprint
    for name in READ:
        kept = (copy / name).read_bytes()
        if name.endswith("rs"):
            flip(copy / name)  # a byte in the middle
        else:
            (copy / name).write_bytes(kept + b" ")
        assert checkpoints.resolve(str(copy)).fingerprint != first, name
        (copy / name).write_bytes(kept)
        assert checkpoints.resolve(str(copy)).fingerprint == first, name


def test_a_file_is_read_once(read: list[str], file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"x")
    (tmp_path / "link").symlink_to(file)
    for _ in range(2):
        assert sha256_of([other, file, tmp_path / "link"]) == [digest(other), digest(file), digest(file)]
    assert sorted(read) == ["link", "other", "weights"]
    assert cache_file().stat().st_mode & 0o077 in (0, 0o044)  # nobody else may write
    assert not list(cache_file().parent.glob(".nbl-export-*"))


@pytest.mark.parametrize("how", ["bytes", "time", "replaced"])
def test_a_changed_file_is_read_again(how: str, read: list[str], file: Path, tmp_path: Path) -> None:
    """Also where its size and its time of modification are what they were."""
    sha256_of([file])
    before = file.stat()
    if how == "replaced":
        (tmp_path / "new").write_bytes(file.read_bytes()[::-1])
        os.replace(tmp_path / "new", file)
    else:
        flip(file)
    if how != "bytes":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sha256_of([file]) == [digest(file)]
    assert len(read) == 2


def test_a_file_that_is_being_written_is_not_remembered(
    read: list[str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_lists, "_SETTLED_SECONDS", 1000.0)
    assert [sha256_of([file]) for _ in range(2)] == [[digest(file)]] * 2
    assert len(read) == 2
    assert not cache_file().exists()


def test_small_files_are_not_remembered(read: list[str], file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_lists, "_KEPT_BYTES", 1 << 20)
    sha256_of([file])
    assert not cache_file().exists()


def forge(value: Any) -> Callable[[Path], object]:
    return lambda path: path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def link_file(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def link_directory(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.symlink_to(path.parent.with_name("elsewhere"))


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "empty": forge(""),
    "cut": forge('{"a'),
    "a list": forge([1]),
    "deep": forge("[" * 100_000),
    "binary": lambda path: path.write_bytes(b"\xff\0"),
    "large": lambda path: path.write_bytes(b" " * (9 << 20) + b"{}"),
    "a directory": directory,
    "a pipe": pipe,
    "group may write": lambda path: path.chmod(0o620),
    "others may write": lambda path: path.chmod(0o602),
    "directory others may write": lambda path: path.parent.chmod(0o777),
    "a link": link_file,
    "a link as directory": link_directory,
    "absent": lambda path: path.unlink(),
}


@pytest.mark.skipif(os.name != "posix", reason="permission bits and links as on POSIX")
@pytest.mark.parametrize("case", HOSTILE)
def test_a_list_that_cannot_be_trusted_is_not(case: str, read: list[str], file: Path) -> None:
    sha256_of([file])
    facts = json.loads(cache_file().read_text())
    facts[str(file)][1] = WRONG
    cache_file().write_text(json.dumps(facts), encoding="utf-8")
    assert sha256_of([file]) == [WRONG]  # ours, as far as can be seen
    HOSTILE[case](cache_file())
    assert sha256_of([file]) == [digest(file)]
    assert sha256_of([file]) == [digest(file)]


@pytest.mark.parametrize("entry", [None, [], [[1], WRONG], ["x", WRONG], [[True] * 5, WRONG], {}, "../x"])
def test_entries_of_a_wrong_kind_are_passed_over(entry: Any, read: list[str], file: Path) -> None:
    sha256_of([file])
    facts = json.loads(cache_file().read_text())[str(file)][0]
    said = [facts, entry] if isinstance(entry, str) else entry
    cache_file().write_text(json.dumps({str(file): said}), encoding="utf-8")
    assert sha256_of([file]) == [digest(file)]


def test_the_list_stays_small(read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_lists, "_MOST_ENTRIES", 3)
    files = [tmp_path / str(i) for i in range(5)]
    for file in files:
        file.write_bytes(b"x")
        sha256_of([file])
    assert [Path(name).name for name in json.loads(cache_file().read_text())] == ["2", "3", "4"]


def test_without_a_place_to_remember(read: list[str], file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert sha256_of([file]) == [digest(file)]
