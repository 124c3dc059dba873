"""A calibration that is killed goes on from what it had, and ends with the same bytes."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from nbl_export.files import file_sha256
from nbl_export.run.stages import common
from tests.command import keys, snapshot
from tests.damage import flip, truncate
from tests.fork_server import ForkServer

pytestmark = pytest.mark.process

PARTIAL = "calibrate.partial.safetensors"
# Small batches, and a partial file after each of them; a killed process leaves its writes to the system all the same.
OFTEN = """
import os
os.fsync = lambda *_: None
import nbl_export.methods.collector, nbl_export.run.stages.common
nbl_export.methods.collector.BATCH_TOKENS = 128
nbl_export.run.stages.common._SECONDS = nbl_export.run.stages.common._SHARE = 0
"""


@pytest.fixture(scope="module")
def command(same: tuple[object, ...]) -> tuple[object, ...]:
    return ("calibrate", *same[:4], "--calibration-tokens", 1536, *keys(context=64))


@pytest.fixture(scope="module")
def expected(command: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> str:
    """Hash of the moments of a run that nobody disturbed and that wrote no partial file."""
    code = "import nbl_export.methods.collector; nbl_export.methods.collector.BATCH_TOKENS = 128"
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert server.start(*command, "--output", run, code=code).status == 0
    return file_sha256(run / "sums.safetensors")


def going_on(said: str) -> int:
    """Batches that a run went on after."""
    found = re.search(r"resuming after (\d+) of \d+ batches", said)
    return int(found[1]) if found else 0


KILL_AT_RENAME = """
import os, signal
replace, seen = os.replace, []
def replace_and_die(source, target):
    seen.append(os.path.basename(target) == "calibrate.partial.safetensors")
    dies = seen[-1] and sum(seen) == 4
    if dies and {late}:
        replace(source, target)
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_and_die
"""


@pytest.mark.parametrize("late", [False, pytest.param(True, marks=pytest.mark.fuzz)])
def test_killed_while_the_partial_file_is_written(
    late: bool, command: tuple[object, ...], expected: str, tmp_path: Path, server: ForkServer
) -> None:
    run = tmp_path / "run"
    process = server.start(*command, "--output", run, code=OFTEN + KILL_AT_RENAME.format(late=late))
    assert process.status == -signal.SIGKILL, process.err
    assert (run / PARTIAL).is_file()
    done = server.start(*command, "--output", run, code=OFTEN)
    assert done.status == 0, done.err
    assert going_on(done.err) > 0
    assert file_sha256(run / "sums.safetensors") == expected
    assert set(snapshot(run)) == {"text.safetensors", "sums.safetensors", "nbl.json"}


def test_killed_again_and_again(command: tuple[object, ...], expected: str, tmp_path: Path, server: ForkServer) -> None:
    """No batch is counted twice, however many partial files a run has gone on from."""
    run, before = tmp_path / "run", 0
    for kill in range(3):
        process = server.start(*command, "--output", run, code=OFTEN + KILL_AT_RENAME.format(late=True))
        assert process.status == -signal.SIGKILL, process.err
        assert going_on(process.err) > before or not kill
        before = going_on(process.err)
    done = server.start(*command, "--output", run, code=OFTEN)
    assert done.status == 0 and going_on(done.err) > before, done.err
    assert file_sha256(run / "sums.safetensors") == expected


@pytest.fixture(scope="module")
def killed(command: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Path:
    """A run that was killed with a partial file."""
    run = tmp_path_factory.mktemp("killed") / "run"
    code = OFTEN + KILL_AT_RENAME.format(late=True)
    assert server.start(*command, "--output", run, code=code).status == -signal.SIGKILL
    return run


@pytest.fixture
def interrupted(killed: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param("flip", marks=pytest.mark.fuzz),
        "truncate",
        pytest.param("empty", marks=pytest.mark.fuzz),
        "foreign",
    ],
)
def test_damaged_partial_file_is_not_used(
    harm: str, command: tuple[object, ...], expected: str, interrupted: Path, server: ForkServer, text: Path
) -> None:
    partial = interrupted / PARTIAL
    if harm == "flip":
        flip(partial)
    elif harm == "foreign":
        shutil.copyfile(text, partial)
    else:
        truncate(partial, 0 if harm == "empty" else 1000)
    done = server.start(*command, "--output", interrupted, code=OFTEN)
    assert done.status == 0, done.err
    assert going_on(done.err) == 0
    assert file_sha256(interrupted / "sums.safetensors") == expected


def test_partial_files_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sooner than half a minute after the last, and where writing is slow, than fifty times what that took."""
    now, written = [0.0], []

    def keep(_done: int) -> None:
        written.append(now[0])
        now[0] += 4

    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    for _ in common.shared_batches([torch.zeros(1)] * 60, 0, lambda *_: None, keep):
        now[0] += 10
    assert written == [30, 234, 438]
