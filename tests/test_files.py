"""Files that appear whole or not at all, by scratch files that nobody can have prepared."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export import files
from nbl_export.calibrate.moments_file import MomentsWriter
from nbl_export.calibrate.sums import Sums
from nbl_export.distill.state import State
from nbl_export.errors import NblError
from nbl_export.files import is_scratch, move_into_place, replaced, replacing, scratch_in, write_json
from nbl_export.report import console


def moments(path: Path) -> None:
    row, square = torch.arange(3.0, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    with MomentsWriter(path, {}, 2, ["normed"], (3, 3)) as writer:
        for _ in range(2):
            writer.write({"normed": Sums(1, *[row] * 6, *[square] * 3)})


def stream(path: Path) -> None:
    with replacing(path) as out:
        out.write(b"new")


WRITERS: dict[str, Callable[[Path], None]] = {
    "stream": stream,
    "json": lambda path: write_json(path, {"a": 1}),
    "moments": moments,
    "distillation": lambda path: State(path, "key").save({"a": torch.zeros(2)}, {}),
    "table": lambda path: console.write("text", path),
}


class Recorder:
    """A stand-in for os: what was on the disk when files were synchronised and renamed, in this order."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, bytes]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, number: int) -> None:
        os.fsync(number)
        self._saw("fsync", Path(f"/proc/self/fd/{number}"))

    def replace(self, source: Path, target: Path) -> None:
        self._saw("replace", source)
        os.replace(source, target)

    def _saw(self, what: str, path: Path) -> None:
        self.seen.append((what, path.stat().st_ino, path.read_bytes()))


@pytest.mark.parametrize("name", WRITERS)
def test_bytes_are_on_the_disk_before_the_file_has_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power loss leaves an empty file in the place of a good one."""
    recorder = Recorder()
    monkeypatch.setattr(files, "os", recorder)
    WRITERS[name](tmp_path / "file")
    assert [what for what, *_ in recorder.seen] == ["fsync", "replace"]
    assert recorder.seen[0][1:] == recorder.seen[1][1:]
    assert recorder.seen[0][2] == (tmp_path / "file").read_bytes() != b""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@contextlib.contextmanager
def failing(path: Path) -> Iterator[None]:
    (path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError):
        yield
    assert (path / "file").read_text() == "old"
    assert [p.name for p in path.iterdir()] == ["file"]


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    with failing(tmp_path), replacing(tmp_path / "file") as out:
        out.write(b"new")
        raise ZeroDivisionError
    with failing(tmp_path), replaced(tmp_path / "file") as place:
        place.write_text("new")
        raise ZeroDivisionError
    with failing(tmp_path), MomentsWriter(tmp_path / "file", {}, 2, ["normed"], (3, 3)):
        raise ZeroDivisionError
    with pytest.raises(AssertionError), MomentsWriter(tmp_path / "file", {}, 2, ["normed"], (3, 3)):
        pass  # layers are missing
    assert (tmp_path / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
@pytest.mark.parametrize("name", ["stream", "json", "moments", "table"])  # safetensors gives its files 0600
def test_files_have_the_permissions_that_open_gives(name: str, mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        WRITERS[name](tmp_path / "file")
        made = tmp_path / "made"
        (made / "below").mkdir(parents=True)
        move_into_place(made, tmp_path / "directory")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "directory").stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("name", WRITERS)
def test_links_that_were_prepared_are_not_followed(name: str, tmp_path: Path) -> None:
    """In a folder of a stranger, under every name that this process could be expected to take."""
    (tmp_path / "mine").write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    for beside in ("", f"-{os.getpid()}", f"-{os.getpid() + 1}"):
        for begin in (".nbl-export-", "."):
            (folder / f"{begin}file{beside}").symlink_to("../mine")
    (folder / "file").symlink_to("../mine")
    WRITERS[name](folder / "file")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (folder / "file").is_file() and not (folder / "file").is_symlink()


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_what_fills_the_target_meanwhile_stays(kind: str, tmp_path: Path) -> None:
    made, target = tmp_path / "made", tmp_path / "target"
    made.mkdir()
    mine = target / "mine" if kind == "directory" else target
    mine.parent.mkdir(exist_ok=True)
    mine.symlink_to("nowhere") if kind == "link" else mine.write_text("mine")
    with pytest.raises(NblError, match="target is there already; choose another --output"):
        move_into_place(made, target)
    assert mine.is_symlink() or mine.read_text() == "mine"
    assert not [place for place in tmp_path.iterdir() if is_scratch(place)]


def test_scratch_is_new_and_of_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    names = iter(["taken", "link", "free"])
    monkeypatch.setattr(tempfile, "_get_candidate_names", lambda: names)
    (tmp_path / "mine").mkdir()
    (tmp_path / ".nbl-export-taken").mkdir()
    (tmp_path / ".nbl-export-link").symlink_to("mine")
    with scratch_in(tmp_path) as scratch:
        assert scratch == tmp_path / ".nbl-export-free"
        assert scratch.stat().st_mode & 0o077 == 0
    assert not scratch.exists() and (tmp_path / ".nbl-export-link").is_symlink()
