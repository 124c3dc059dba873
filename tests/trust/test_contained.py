"""The walk over a folder of a stranger: every entry at any depth, and an end in any case."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nbl_export.errors import CorruptError, NblError
from nbl_export.run.deployed import locate
from nbl_export.trust import contained
from nbl_export.trust.contained import check_folder, is_inside


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files at three levels, links among them, and a secret outside."""
    here = tmp_path / "folder"
    for name in ("config.json", ".hidden", "onnx/model.onnx", "a/.b/c/deep"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("x")
    (here / "beside").symlink_to("config.json")
    (here / "a" / "up").symlink_to("../onnx")
    (here / "loop").symlink_to(".")
    (here / "nowhere").symlink_to("gone")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "id_rsa").write_text("secret")
    return here


PLACES = (
    "weights", ".weights", "additional_chat_templates/k.jinja", "additional_chat_templates/.k.jinja", "onnx/.data",
    "deeper/openvino_model.bin", "a/.b/c/d", ".lock", ".cache/other", "x/.git/config",
)  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("target", ["secret/id_rsa", "secret", "secret/missing"])
def test_a_link_out_is_refused_wherever_it_is(folder: Path, name: str, target: str) -> None:
    check_folder(folder)
    link = folder / name
    link.parent.mkdir(parents=True, exist_ok=True)
    for place in (folder.parent / target, os.path.relpath(folder.parent / target, link.parent)):
        link.symlink_to(place)
        with pytest.raises(CorruptError, match="is a link out of its directory") as caught:
            check_folder(folder)
        assert str(link) in str(caught.value)
        link.unlink()


@pytest.mark.parametrize("name", ["weights", ".weights", "a/.b/c/d", "deeper/openvino_model.bin"])
def test_pipes_and_devices_are_refused_wherever_they_are(folder: Path, name: str) -> None:
    acts: tuple[Callable[[Path], object], ...] = (os.mkfifo, lambda path: path.symlink_to("/dev/zero"))
    for make in acts:
        (folder / name).parent.mkdir(exist_ok=True)
        make(folder / name)
        with pytest.raises(CorruptError, match="a pipe, a socket or a device; remove it") as caught:
            check_folder(folder)
        assert str(folder / name) in str(caught.value)
        (folder / name).unlink()


@pytest.mark.parametrize("name", [".git", ".cache/huggingface"])
def test_bookkeeping_is_left_out_and_nothing_leads_there(folder: Path, name: str) -> None:
    (folder / name / "kept").mkdir(parents=True)
    (folder / name / "kept" / "link").symlink_to(folder.parent / "secret" / "id_rsa")
    check_folder(folder)
    (folder / "additional_chat_templates").symlink_to(folder / name / "kept")
    with pytest.raises(CorruptError, match=r"additional_chat_templates is a link into .*kept, which is not checked"):
        check_folder(folder)


@pytest.mark.parametrize("name", [".git", ".cache", ".cache/huggingface"])
def test_bookkeeping_that_is_a_link_is_no_bookkeeping(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(folder.parent / "secret")
    with pytest.raises(CorruptError, match="is a link out of its directory"):
        check_folder(folder)


def test_the_walk_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither many files nor depth nor chains of links keep a command busy."""
    monkeypatch.setattr(contained, "_MOST_ENTRIES", 500)
    (folder / "many").mkdir()
    for number in range(400):
        (folder / "many" / str(number)).touch()
    check_folder(folder)
    for number in range(400, 600):
        (folder / "many" / str(number)).touch()
    with pytest.raises(NblError, match=r"more than 500 files .* name the folder of the model alone, or its file"):
        check_folder(folder)


def test_a_deep_tree_is_refused(folder: Path) -> None:
    (folder / "/".join("d" * 20)).mkdir(parents=True)
    check_folder(folder)
    (folder / "/".join("d" * 40)).mkdir(parents=True)
    with pytest.raises(NblError, match="32 levels of directories"):
        check_folder(folder)


def test_a_chain_of_links_is_not_walked_to_its_end(folder: Path) -> None:
    for number in range(20_000):
        os.symlink(str(number + 1), folder / str(number))
    began = time.process_time()
    assert not is_inside(folder / "0", folder)
    with pytest.raises(CorruptError, match="is a link out of its directory"):
        check_folder(folder)
    assert time.process_time() - began < 2


def test_a_folder_in_an_openvino_folder_is_checked(tmp_path: Path) -> None:
    folder, inner = tmp_path / "model", tmp_path / "model" / "deeper"
    inner.mkdir(parents=True)
    for place in (folder, inner):
        for name in ("openvino_model.xml", "openvino_model.bin"):
            (place / name).write_text("x")
    assert locate(folder).engine == "openvino"
    (inner / "openvino_model.bin").rename(tmp_path / "id_rsa")
    (inner / "openvino_model.bin").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(CorruptError, match=r"deeper/openvino_model.bin is a link out of its directory"):
        locate(folder)
