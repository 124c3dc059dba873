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
from nbl_export.errors import NblError
from nbl_export.evaluation.results import read_entries
from nbl_export.evaluation.scorer import continuing_of
from nbl_export.files import (
    SMALL_BYTES,
    is_scratch,
    move_into_place,
    replaced,
    replacing,
    safetensors_tensors,
    scratch_in,
    write_json,
)
from nbl_export.graph.ir.anatomy import context_length
from nbl_export.graph.ir.files import check_ir
from nbl_export.graph.trust import parsed
from nbl_export.methods.distill.state import State
from nbl_export.methods.sums_file import SumsWriter
from nbl_export.model.checkpoint.weights import weight_files
from nbl_export.run_directory import RunDirectory
from nbl_export.targets.tensorrt.record import read_record
from nbl_export.targets.tokenizer import applied, read_settings
from nbl_export.trust.model_settings import check_tokenizer_settings, read_object

pytestmark = pytest.mark.engine


SHAPES = {"layers.0.sum": (3,), "layers.1.sum": (3,)}


def sums(path: Path) -> None:
    with SumsWriter(path, {}, SHAPES) as writer:
        for name in SHAPES:
            writer.write({name: torch.arange(3.0, dtype=torch.float64)})


def stream(path: Path) -> None:
    with replacing(path) as out:
        out.write(b"new")


WRITERS: dict[str, Callable[[Path], None]] = {
    "stream": stream,
    "json": lambda path: write_json(path, {"a": 1}),
    "sums": sums,
    "distillation": lambda path: State(path, "key").save({"a": torch.zeros(2)}, {}),
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
    with failing(tmp_path), SumsWriter(tmp_path / "file", {}, SHAPES):
        raise ZeroDivisionError
    with pytest.raises(AssertionError), SumsWriter(tmp_path / "file", {}, SHAPES):
        pass  # layers are missing
    assert (tmp_path / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
@pytest.mark.parametrize("name", ["stream", "json", "sums"])  # safetensors gives its files 0600
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


def opened(folder: Path) -> object:
    with RunDirectory(folder).opened(create=False) as run:
        return run


def inspected(folder: Path) -> None:
    (folder / "openvino_model.bin").touch()
    check_ir(folder)


BIG: dict[str, tuple[str, int, Callable[[Path], object]]] = {
    "configuration": ("config.json", SMALL_BYTES, lambda folder: read_object(folder / "config.json")),
    "manifest": ("nbl.json", SMALL_BYTES, opened),
    "manifest beside a graph": ("nbl.json", SMALL_BYTES, continuing_of),
    "index": ("model.safetensors.index.json", SMALL_BYTES, weight_files),
    "template": ("chat_template.jinja", SMALL_BYTES, lambda folder: applied(folder, "Hi")),
    "template for transformers": ("chat_template.jinja", SMALL_BYTES, check_tokenizer_settings),
    "tokenizer": ("tokenizer.json", 1 << 28, check_tokenizer_settings),
    "tokenizer's settings": ("t.json", SMALL_BYTES, lambda folder: read_settings(folder / "t.json")),
    "engine's record": ("engine.json", SMALL_BYTES, read_record),
    "results": ("eval.json", SMALL_BYTES, lambda folder: read_entries(folder / "eval.json")),
    "positions of an IR": ("config.json", SMALL_BYTES, context_length),
    "graph of an IR": ("openvino_model.xml", 1 << 26, inspected),
    "graph": ("model.onnx", 2 << 30, lambda folder: parsed(folder / "model.onnx")),
}


@pytest.mark.parametrize("what", BIG)
def test_a_file_larger_than_any_of_its_kind_is_not_read(what: str, tmp_path: Path) -> None:
    """The file takes no place on the disk, and is a byte too large."""
    name, most, read = BIG[what]
    with (tmp_path / name).open("wb") as file:
        file.truncate(most + 1)
    with pytest.raises(NblError, match="is larger than") as caught:
        read(tmp_path)
    assert name in str(caught.value)


NESTED = b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4],"b":' + b"[" * 10**5 + b"]" * 10**5 + b"}}"


@pytest.mark.parametrize(
    "header",
    [
        b"", b"[]", b"{", b'{"a":1}', b'{"a":{}}', b'{"__metadata__":7}', b"\xff\xfe", NESTED,
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":["0","4"]}}',
        b'{"a":{"dtype":3,"shape":[1],"data_offsets":[0,4]}}',
    ],
    ids=range(13),
)  # fmt: skip
@pytest.mark.parametrize("stated", [None, 1 << 40, (1 << 64) - 1])
def test_a_hostile_header_of_safetensors_is_one_sentence(header: bytes, stated: int | None, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    size = len(header) if stated is None else stated
    file.write_bytes(size.to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(NblError, match=r"model\.safetensors is truncated or not a safetensors file"):
        safetensors_tensors(file)
