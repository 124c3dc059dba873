"""Eleven thousand hostile files: each ends in success or in one line that says why, and touches nothing else.

    pytest -m fuzz tests/test_fuzz.py                         all of them; an hour and more
    NBL_FUZZ_SHARE=0.01 pytest -m fuzz tests/test_fuzz.py     a hundred

`make test` runs a few of each kind. NBL_FUZZ_SEED starts elsewhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from nbl_export.errors import NblError
from nbl_export.run_directory import RunDirectory

from .canaries import MARK, Canaries, put_outside
from .command import Outcome, snapshot
from .fuzz_kinds import KINDS, Kind, has, make_pristine, options, victim
from .sandbox import MOST_BYTES, Sandbox, watched


@pytest.fixture(scope="module")
def pristine(
    checkpoint: Any, exported: Any, finished: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    here = tmp_path_factory.mktemp("pristine")
    folders = {"model": checkpoint("llama"), "graph": exported("llama"), "run": finished, "deploy": finished / "model"}
    if has("openvino"):
        folders["ir"] = exported("llama", "openvino")
    make_pristine(here, folders, text.read_text())
    return here


@pytest.fixture(scope="module")
def canaries(tmp_path_factory: pytest.TempPathFactory) -> Canaries:
    return Canaries(tmp_path_factory.mktemp("canaries"))


@pytest.fixture(scope="module")
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with Sandbox() as made:
        yield made
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        sys.stdout.write(f"\n{made.count} commands; the largest took {made.largest / 2**20:.0f} MiB of memory\n")


def complaint(done: Outcome) -> str:
    """What is wrong with how a command ended; nothing where it is as promised."""
    if done.status == 0:
        return "" if "Traceback" not in done.err else "a traceback"
    said = [line for line in done.err.splitlines() if not line.endswith(("...", "reused", " s", " of disk"))]
    expected = (
        "WARNING: calibration text",
        "WARNING: layer ",
        "Ignored unknown kwarg option",
    )  # true of these texts; tokenizers' own
    said = [line for line in said if not line.startswith(expected)]
    if done.status not in (1, 2, 3):
        return f"status {done.status}"
    if len(said) != 1 or not said[0].startswith("nbl-export: "):
        return f"{len(said)} lines on stderr"
    if len(said[0]) > 1200:
        return "a page on one line"
    return "" if not done.out else "something on stdout"


def is_whole(run: Path, changed: set[str]) -> bool:
    """Whether stages on record have their changed files: a command that goes on with a run may end on the way."""
    try:
        found = RunDirectory.peek(run)
        for stage, record in found.stages.items():
            if changed & record["files"].keys():
                found.check(stage)
    except NblError:
        return False
    return bool(found.stages)


def attempt(kind: Kind, seed: int, pristine: Path, place: Path, sandbox: Sandbox, canaries: Canaries) -> str:
    """Damage, run, and say what is wrong."""
    outside, here = place / "outside", place / "v"
    put_outside(outside)
    damaged = victim(pristine, here, kind, canaries)
    kind.damage(Random(seed), damaged)
    before, mine = snapshot(here), snapshot(outside)
    command = kind.command.format(here=here).split()
    with watched(outside, here / "outside") as watch:
        done = sandbox.run(*command, *options(command), place=here / "strange")
        touched = watch.seen()
    after = {n: h for n, h in snapshot(here).items() if not n.startswith("out/")}
    wrong = complaint(done)
    if touched:
        wrong += f"; touched {set(touched)} outside"
    if traces := canaries.touched():
        wrong += f"; ran {traces}"
    if leaks := leaked(done, before, here):
        wrong += f"; shows the secret in {leaks}"
    if snapshot(outside) != mine:
        wrong += "; changed what is outside"
    changed = {n.removeprefix("run/") for n in {*before, *after} if before.get(n) != after.get(n)}
    if done.status != 0 and changed and not is_whole(here / "run", changed):
        wrong += f"; changed {sorted(changed)}"
    if done.status != 0 and command[0] != "calibrate" and (here / "out").exists():
        wrong += "; left an output"
    return f"{wrong.strip('; ')}: {done.err[-1500:]}" if wrong else ""


def leaked(done: Outcome, before: dict[str, str], here: Path) -> list[str]:
    """Where the bytes of the secret have come to: what was said, or files that were not there before."""
    said = [name for name, text in (("stdout", done.out), ("stderr", done.err)) if MARK.decode() in text]
    made = (p for p in here.rglob("*") if p.is_file() and not p.is_symlink())
    fresh = {str(p.relative_to(here)): p for p in made if str(p.relative_to(here)) not in before}
    return said + [name for name, path in fresh.items() if MARK in path.read_bytes()]


def require(kind: Kind) -> Kind:
    """The kind, if what it needs is installed."""
    if not all(map(has, kind.needs)):
        pytest.skip(f"needs {' and '.join(kind.needs)}")
    return kind


def assert_survives(name: str, count: int, pristine: Path, place: Path, sandbox: Sandbox, canaries: Canaries) -> None:
    first = int(os.environ.get("NBL_FUZZ_SEED", "0"))
    kind = require(KINDS[name])
    found = {}
    for seed in range(first, first + count):
        wrong = attempt(kind, seed, pristine, place, sandbox, canaries)
        if wrong:
            found[seed] = wrong
    assert not found, f"{len(found)} of {count}: " + "\n".join(f"seed {s}: {w}" for s, w in list(found.items())[:20])


@pytest.mark.fuzz
@pytest.mark.parametrize("name", KINDS)
def test_hostile(name: str, pristine: Path, tmp_path: Path, sandbox: Sandbox, canaries: Canaries) -> None:
    share = float(os.environ.get("NBL_FUZZ_SHARE", "1"))
    assert sum(kind.count for kind in KINDS.values()) == 11_300
    assert_survives(name, max(1, round(KINDS[name].count * share)), pristine, tmp_path, sandbox, canaries)


@pytest.mark.parametrize("name", KINDS)
def test_hostile_few(name: str, pristine: Path, tmp_path: Path, sandbox: Sandbox, canaries: Canaries) -> None:
    assert_survives(name, 1, pristine, tmp_path, sandbox, canaries)


COMMANDS = {kind.command: kind for kind in KINDS.values()}


def test_undamaged(pristine: Path, tmp_path: Path, sandbox: Sandbox, canaries: Canaries) -> None:
    """Otherwise every refusal would be of something else."""
    for kind in COMMANDS.values():
        if not all(map(has, kind.needs)):
            continue
        victim(pristine, tmp_path / "v", kind, canaries)
        command = kind.command.format(here=tmp_path / "v").split()
        done = sandbox.run(*command, *options(command), place=tmp_path / "v" / "strange")
        assert done.status == kind.status, (kind.command, done.err)
        assert canaries.touched() == [], kind.command


def test_canaries_leave_a_trace(canaries: Canaries, tmp_path: Path) -> None:
    canaries.plant(tmp_path)
    acts = {
        "module": "import runpy; runpy.run_path('evil.py')",
        "pickle": "import pickle; pickle.load(open('pytorch_model.bin', 'rb'))",
        "library": "import ctypes; ctypes.CDLL('./canary.so')",
    }
    for trace, code in acts.items():
        if trace == "library" and not canaries.has_library:
            continue
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
        assert canaries.touched() == [trace]
    assert canaries.touched() == []


def test_a_command_that_takes_much_memory_is_ended(sandbox: Sandbox, tmp_path: Path, monkeypatch: Any) -> None:
    """A quarter of a GiB above the bound, which no limit of the address space forbids."""
    from . import sandbox as module

    def greedy(*_: object) -> Outcome:
        taken = bytearray(MOST_BYTES + (256 << 20))
        taken[::4096] = bytes([1]) * len(taken[::4096])
        return Outcome(1, "", "nbl-export: no memory\n")

    with Sandbox() as other:
        monkeypatch.setattr(module, "nbl", greedy)
        assert other.run("doctor", place=tmp_path) == Outcome(-9, "", f"more than {MOST_BYTES >> 20} MiB of memory")
        monkeypatch.setattr(module, "nbl", lambda *_: Outcome(0, "", ""))
        assert other.run("doctor", place=tmp_path).status == 0
    assert other.largest > MOST_BYTES


SHADOWS = ("json", "numpy", "torch", "onnx", "transformers", "openvino", "tensorrt_rtx", "sitecustomize",
           "usercustomize", "typing", "typer", "rich", "nbl_export")  # fmt: skip


@pytest.mark.parametrize("way", ["nbl-export", "python -m nbl_export"])
def test_no_module_of_the_working_directory_is_imported(canaries: Canaries, tmp_path: Path, way: str) -> None:
    """In a new process. `python -m` looks for nbl_export itself in the working directory first: Python's own rule."""
    canaries.plant(tmp_path)
    installed = way == "nbl-export"
    for name in SHADOWS[: None if installed else -1]:
        shutil.copyfile(tmp_path / "evil.py", tmp_path / f"{name}.py")
    script = "import sys; from nbl_export.cli.app import main; sys.argv = ['nbl-export', 'doctor']; main()"
    command = ["-I", "-c", script] if installed else ["-m", "nbl_export", "doctor"]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert canaries.touched() == []


def test_what_is_touched_is_seen(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with watched(tmp_path) as watch:
        assert watch.seen() == []
        (tmp_path / "secret").read_text()
        assert set(watch.seen()) == {"secret"}
