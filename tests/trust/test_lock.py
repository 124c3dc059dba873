"""The lock of a run directory: a stranger's directory may hold one that points elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from nbl_export.errors import CorruptError
from nbl_export.run_directory import RunDirectory

from ..command import assert_refused, nbl, snapshot

pytestmark = pytest.mark.job

PLACES: dict[str, Callable[[Path, Path], object]] = {
    "a link": lambda lock, target: lock.symlink_to(target),
    "a link to nothing": lambda lock, target: lock.symlink_to(target.with_name("new")),
    "another name of a file": lambda lock, target: os.link(target, lock),
    "a pipe": lambda lock, _: os.mkfifo(lock),
    "a directory": lambda lock, _: lock.mkdir(),
    "a device": lambda lock, _: lock.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_lock_that_leads_elsewhere_is_refused(case: str, run: Path, same: tuple[object, ...], tmp_path: Path) -> None:
    target = tmp_path / "outside" / "file"
    target.parent.mkdir()
    target.write_text("mine")
    (run / ".lock").unlink(missing_ok=True)
    PLACES[case](run / ".lock", target)
    before = snapshot(run)
    for arguments in (("report", run), (*same, "--output", run), (*same, "--output", run, "--force")):
        assert_refused(nbl(*arguments), 1, run / ".lock", "remove it")
    assert snapshot(run) == before
    assert target.read_text() == "mine"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_filelock_itself_does_not_follow_a_link(tmp_path: Path) -> None:
    """For a link that is put there between the look and the lock."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(OSError, match="symbolic"):
        FileLock(str(tmp_path / "link"), timeout=0).acquire()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_plain_lock_is_taken(run: Path) -> None:
    (run / ".lock").write_text("")
    with RunDirectory(run).opened(create=False) as opened:
        assert opened.stages
    (run / ".lock").rename(run / "kept")
    (run / ".lock").symlink_to("kept")
    with pytest.raises(CorruptError), RunDirectory(run).opened(create=False):
        pass
