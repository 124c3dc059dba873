"""Hostile inputs of 65 kinds: each ends in success or in one line that says why, and touches nothing else.

    pytest -m fuzz tests/test_fuzz.py                         all of them; minutes
    NBL_FUZZ_SHARE=0.02 pytest -m fuzz tests/test_fuzz.py     a hundred

Every command reads inputs of some kind (`fuzz_kinds`). Judged of each input: how the command ends, resident memory,
time of the processor, files outside the output, scratch files, connections, and code of a stranger that ran.
`make test` runs one of each kind. NBL_FUZZ_SEED starts elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from nbl_export.cli.commands import COMMANDS as CLI
from nbl_export.errors import NblError
from nbl_export.run_directory import RunDirectory

from .canaries import MARK, Canaries, put_outside
from .codes import quantise
from .command import BARE, Outcome, nbl
from .fuzz_kinds import COMMANDS, KINDS, REFUSED, WORDS, Kind, has, make_pristine, victim
from .hostile import hostile_words
from .sandbox import MOST_BYTES, Sandbox, watched

pytestmark = [pytest.mark.job, pytest.mark.process]


@pytest.fixture(scope="module")
def pristine(
    checkpoint: Any, exported: Any, finished: Path, text: Path, stores: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    here = tmp_path_factory.mktemp("pristine")

    def make(folder: Path) -> None:
        run = shutil.copytree(finished, folder / "run")
        exits = ("--exit-layer", 1, "--recent-tokens", 4, "--output", folder / "exit")
        for command in (
            ("convert", run, "--to", "transformers", "--output", folder / "nbl"),
            ("--model", checkpoint("llama"), "--calibration", text, *BARE, *exits),
        ):
            done = nbl(*command)
            assert done.status == 0, done.err
        for name, method in (("codes", "gptq"), ("awq", "awq")):
            quantise(checkpoint("llama"), folder / name, method)

    made = stores["package"].get("fuzz", make)
    folders = {name: made / name for name in ("run", "exit", "nbl", "codes", "awq")}
    folders |= {"model": checkpoint("llama"), "graph": exported("llama"), "deploy": finished / "model"}
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
    rows = [made.took]
    if records := os.environ.get("NBL_FUZZ_RECORDS"):
        with open(records, "a+", encoding="utf-8") as file:
            file.write(json.dumps(made.took) + "\n")
            file.seek(0)
            rows = [json.loads(line) for line in file]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        sys.stdout.write(f"\n{by_command(rows)}\n")


def by_command(rows: list[dict[str, Any]]) -> str:
    """The table of CONTRIBUTING.md, from what several sandboxes took."""
    lines = ["| command | inputs | largest MiB | longest s | all s |", "|---|---:|---:|---:|---:|"]
    names = sorted({name for row in rows for name in row})
    found = {name: list(zip(*(row[name] for row in rows if name in row), strict=True)) for name in names}
    found["all"] = [sum(columns, ()) for columns in zip(*found.values(), strict=True)]
    for name, (count, most, longest, seconds) in found.items():
        took = f"{max(most) / 2**20:.0f} | {max(longest):.1f} | {sum(seconds):.0f}"
        lines.append(f"| {name} | {sum(count):,} | {took} |")
    return "\n".join(lines)


def complaint(done: Outcome) -> str:
    """What is wrong with how a command ended; nothing where it is as promised."""
    if done.status == 0:
        return "" if "Traceback" not in done.err else "a traceback"
    beside = ("  ", "estimate: ", "WARNING: calibration text", "WARNING: layer ", "Ignored unknown kwarg option")
    lines = (line for line in done.err.splitlines() if not line.startswith(beside))  # of stages; tokenizers' own
    said = [
        line for line in lines if not line.endswith(("...", "reused", " s", " of disk")) and ": left out, " not in line
    ]
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


def attempt(
    kind: Kind, command: str, seed: int, pristine: Path, place: Path, sandbox: Sandbox, canaries: Canaries
) -> str:
    """Damage, run, and say what is wrong."""
    outside, here = place / "outside", place / "v"
    put_outside(outside)
    damaged = victim(pristine, here, kind, command, canaries)
    kind.damage(Random(seed), damaged)
    before, mine = state(here), state(outside)
    decoys = [path for path in (here / "strange").rglob("*") if path.is_dir()]
    with watched(outside, here / "outside", *decoys) as watch:
        words = command.format(here=here, **hostile_words(Random(seed))).split()
        done = sandbox.run(*words, place=here / "strange")
        touched = watch.seen()
    after = state(here)
    wrong = complaint(done)
    if touched:
        wrong += f"; touched {set(touched)} outside"
    if traces := canaries.touched():
        wrong += f"; ran {traces}"
    if leaks := leaked(done, before, here):
        wrong += f"; shows the secret in {leaks}"
    if sandbox.connections and not command.startswith("card"):
        wrong += f"; talks to {sandbox.connections}"
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    if beyond := {
        name for name in changed if not name.startswith(("out/", *_runs(command), "home/.cache/nbl-export/"))
    }:
        wrong += f"; changed {sorted(beyond)} outside the output"
    if state(outside) != mine:
        wrong += "; changed what is outside"
    for run in _runs(command) if done.status != 0 else ():
        mended = {name.removeprefix(run) for name in changed if name.startswith(run)}
        if mended and not is_whole(here / run, mended):
            wrong += f"; changed {sorted(mended)}"
    if done.status != 0 and not command.startswith(("calibrate", "--")) and (here / "out").exists():
        wrong += "; left an output"
    return f"{command.partition(' ')[0]}: {wrong.strip('; ')}: {done.err[-1500:]}" if wrong else ""


def _runs(command: str) -> tuple[str, ...]:
    """Runs that a command goes on with."""
    return tuple(f"{run}/" for run in ("run", "exit") if f"{{here}}/{run}" in command)


_LARGE_BYTES = 64 << 20


def state(directory: Path) -> dict[str, str]:
    """Relative name -> SHA-256 of every file, or the size of a large one; locks are left out."""
    found = {}
    for path in directory.rglob("*"):
        if path.is_file() and path.name != ".lock":
            large = path.stat().st_size > _LARGE_BYTES
            name = str(path.relative_to(directory))
            found[name] = str(path.stat().st_size) if large else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def leaked(done: Outcome, before: dict[str, str], here: Path) -> list[str]:
    """Where the bytes of the secret have come to: what was said, or files that were not there before."""
    said = [name for name, text in (("stdout", done.out), ("stderr", done.err)) if MARK.decode() in text]
    made = (p for p in here.rglob("*") if p.is_file() and not p.is_symlink())
    fresh = {str(p.relative_to(here)): p for p in made if str(p.relative_to(here)) not in before}
    return said + [name for name, path in fresh.items() if MARK in path.read_bytes()]


def assert_survives(name: str, count: int, pristine: Path, place: Path, sandbox: Sandbox, canaries: Canaries) -> None:
    first, found, kind = int(os.environ.get("NBL_FUZZ_SEED", "0")), {}, KINDS[name]
    if not all(map(has, kind.needs)):
        pytest.skip(f"needs {' and '.join(kind.needs)}")
    for seed in range(first, first + count):
        command = kind.commands[seed % len(kind.commands)]
        wrong = attempt(kind, command, seed, pristine, place, sandbox, canaries)
        if wrong:
            found[seed] = wrong
    assert not found, f"{len(found)} of {count}: " + "\n".join(f"seed {s}: {w}" for s, w in list(found.items())[:20])


@pytest.mark.fuzz
@pytest.mark.parametrize("name", KINDS)
def test_hostile(name: str, pristine: Path, tmp_path: Path, sandbox: Sandbox, canaries: Canaries) -> None:
    share = float(os.environ.get("NBL_FUZZ_SHARE", "1"))
    assert_survives(name, max(1, round(KINDS[name].count * share)), pristine, tmp_path, sandbox, canaries)


@pytest.mark.parametrize("name", KINDS)
def test_hostile_few(name: str, pristine: Path, tmp_path: Path, sandbox: Sandbox, canaries: Canaries) -> None:
    assert_survives(name, 1, pristine, tmp_path, sandbox, canaries)


def test_every_command_reads_hostile_input() -> None:
    first = {command.split()[0] for command in COMMANDS}
    assert {"main" if name.startswith("--") else name for name in first} == {"main", *CLI}
    assert sum(kind.count for kind in KINDS.values()) == 5960  # as SECURITY.md says


def test_undamaged(pristine: Path, tmp_path: Path, sandbox: Sandbox, canaries: Canaries) -> None:
    """Otherwise every refusal would be of something else."""
    for command, kind in COMMANDS.items():
        if not all(map(has, kind.needs)):
            continue
        victim(pristine, tmp_path / "v", kind, command, canaries)
        words = command.format(here=tmp_path / "v", **WORDS).split()
        done = sandbox.run(*words, place=tmp_path / "v" / "strange")
        assert done.status == REFUSED.get(command, 0), (command, done.err)
        assert canaries.touched() == [], command


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


def _greedy(*_: object) -> Outcome:
    """Takes more than the bound, which no limit of the address space forbids.

    A process that ran other tests may reuse up to a GiB that it holds already, which is not counted.
    """
    taken = bytearray(2 * MOST_BYTES + (512 << 20))
    taken[::4096] = bytes([1]) * len(taken[::4096])
    return Outcome(1, "", "nbl-export: no memory\n")


def _endless(*_: object) -> Outcome:
    while True:
        hash("work")


def _talkative(*_: object) -> Outcome:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("hub.example", 443), timeout=1)
    return Outcome(0, "", "")


def test_what_a_command_must_not_do_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory, time and connections; the next command is run all the same."""
    from . import sandbox as module

    for act, status, said in ((_greedy, -9, "MiB of memory"), (_endless, -9, "s of work"), (_talkative, 0, "")):
        with Sandbox() as other:
            monkeypatch.setattr(module, "nbl", act)
            monkeypatch.setattr(module, "MOST_SECONDS", 4.0 if act is _endless else 60.0)
            done = other.run("doctor", place=tmp_path)
            assert (done.status, said in done.err) == (status, True), done
            assert other.connections == (["hub.example"] if act is _talkative else [])
            monkeypatch.setattr(module, "nbl", lambda *_: Outcome(0, "", ""))
            assert other.run("doctor", place=tmp_path).status == 0


@pytest.mark.parametrize(
    ("file", "seen"),
    [("home/x", True), ("temporary/x", True), ("strange/x", True), ("model/x", True), ("outside/x", True),
     ("../outside/x", True), ("run/x", True), ("out/x", False), ("home/.cache/nbl-export/x", False)],
)  # fmt: skip
def test_a_file_beside_the_output_is_seen(
    file: str, seen: bool, pristine: Path, tmp_path: Path, canaries: Canaries
) -> None:
    class Writing(Sandbox):
        def run(self, *_: object, place: Path) -> Outcome:
            (place.parent / file).parent.mkdir(parents=True, exist_ok=True)
            (place.parent / file).write_text("x")
            return Outcome(0, "", "")

    kind = KINDS["config.json"]
    assert ("outside" in attempt(kind, kind.commands[0], 0, pristine, tmp_path, Writing(), canaries)) == seen


SHADOWS = ("json", "numpy", "torch", "onnx", "transformers", "openvino", "tensorrt_rtx", "sitecustomize",
           "usercustomize", "typing", "click", "rich", "nbl_export")  # fmt: skip


@pytest.mark.parametrize("way", ["nbl-export", "python -m nbl_export"])
def test_no_module_of_the_working_directory_is_imported(canaries: Canaries, tmp_path: Path, way: str) -> None:
    """In a new process. `python -m` looks for nbl_export itself in the working directory first: Python's own rule."""
    here, script = tmp_path / "here", tmp_path / "bin" / "nbl-export"  # the script as pip installs it
    for folder in (here, script.parent):
        folder.mkdir()
    canaries.plant(here)
    installed = way == "nbl-export"
    for name in SHADOWS[: None if installed else -1]:
        shutil.copyfile(here / "evil.py", here / f"{name}.py")
    script.write_text("from nbl_export.cli.app import main\nmain()\n", encoding="utf-8")
    command = [str(script), "doctor"] if installed else ["-m", "nbl_export", "doctor"]
    done = subprocess.run([sys.executable, *command], cwd=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert canaries.touched() == []


def test_what_is_touched_is_seen(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with watched(tmp_path) as watch:
        assert watch.seen() == []
        (tmp_path / "secret").read_text()
        assert set(watch.seen()) == {"secret"}
