"""The list of engines that the user built here: what is on it may run, so nobody else may write to it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nbl_export.errors import CorruptError, NblError
from nbl_export.records.decoder import TensorInfo
from nbl_export.targets.tensorrt.record import EngineRecord, read_record
from nbl_export.targets.tensorrt.static.schedule import Profile
from nbl_export.trust import own_engines
from nbl_export.trust.own_engines import is_own, remember

pytestmark = pytest.mark.engine

DIGEST, OTHER = "ab" * 32, "cd" * 32


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cache" / "nbl-export" / "engines"
    monkeypatch.setattr(own_engines, "_list", lambda: place)
    return place


def test_the_list_is_in_the_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbl_export.trust.own_engines import cache_folder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "nbl-export"


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o000])
def test_what_was_remembered_is_known(home: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        assert not is_own(DIGEST)
        remember(DIGEST)
        remember(DIGEST)
    finally:
        os.umask(before)
    assert is_own(DIGEST) and not is_own(OTHER)
    assert [path.name for path in home.iterdir()] == [DIGEST]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../made", DIGEST.upper(), DIGEST[:-1], f"../engines/{DIGEST}", "/tmp/../{home}/made"]
)
def test_only_hashes_are_known_and_remembered(home: Path, name: str) -> None:
    remember(DIGEST)
    before = sorted(home.parent.parent.rglob("*"))
    named = name.format(home=home.parent)
    assert not is_own(named)
    with pytest.raises(NblError, match="no SHA-256 of a compiled file"):
        remember(named)
    assert sorted(home.parent.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("plan_sha256", [DIGEST]), ("engine", {}), ("max_batch", "1"), ("plan_bytes", None), ("cache_bytes", "1"),
     ("profiles", [{"name": "p", "batch": [1, 1], "tokens": [1, 1, 1]}]), ("inputs", [{"name": "x"}]),
     ("compute_capabilities", [8.9]), ("gpu", "missing")],
)  # fmt: skip
def test_a_record_with_a_value_of_another_kind(name: str, value: object, tmp_path: Path) -> None:
    profile, tensor = Profile("prefill", (1, 1, 1), (1, 8, 8)), TensorInfo("input_ids", "int64", (1, "tokens"))
    record = EngineRecord(
        "trt", "10.15", "fp16", "fused", ("8.9",), "NVIDIA L4", 1, 8, 64, (profile,), (tensor,), (), 0, 0, 0, 0.5, 0,
        DIGEST,
    )  # fmt: skip
    (tmp_path / "decoder.engine").write_bytes(b"")
    values = json.loads(json.dumps(record.to_json()))
    (tmp_path / "engine.json").write_text(json.dumps(values))
    assert read_record(tmp_path) == record
    values[name] = value
    if value == "missing":
        del values[name]
    (tmp_path / "engine.json").write_text(json.dumps(values))
    with pytest.raises(CorruptError, match=rf"engine.json cannot be read \(.*(shape|batch|dtype|{name})"):
        read_record(tmp_path)


def _others_may_write(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o020)


def _link(path: Path) -> None:
    shutil.move(path, path.with_name("moved"))
    path.symlink_to(path.with_name("moved"))


@pytest.mark.parametrize("spoil", [_others_may_write, _link])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_list_of_others_is_not_used(home: Path, spoil: Callable[[Path], None], level: int) -> None:
    remember(DIGEST)
    spoil([home / DIGEST, home, home.parent][level])
    assert not is_own(DIGEST)
    with pytest.raises(NblError, match="XDG_CACHE_HOME"):
        remember(DIGEST)


def test_a_list_that_cannot_be_written_is_said(home: Path) -> None:
    home.parent.parent.mkdir()
    home.parent.write_text("in the way")
    with pytest.raises(NblError, match=r"engines, which lists the engines of your own, cannot be written"):
        remember(DIGEST)
