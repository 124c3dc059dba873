"""The same command again: it reuses what is finished, runs what is touched, and survives any interruption."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nbl_export.run import pipeline
from nbl_export.run_directory import RunDirectory
from nbl_export.targets.base import Availability

from ..command import assert_refused, configured, keys, nbl, snapshot, stage_lines
from ..fork_server import ForkServer

pytestmark = [pytest.mark.job, pytest.mark.process]

Same = tuple[object, ...]

TITLES = {"calibrate": "calibrate", "plan": "plan", "decoder": "decoder graph", "rewrite": "rewrite",
          "verify": "verify", "bench": "bench", "report": "report"}  # fmt: skip
ALL = set(TITLES.values())
MEASURING = {"bench", "report"}
GRAPH = {"rewrite", "verify", *MEASURING}


def ran(outcome: Any) -> set[str]:
    """Titles of the stages that were not reused; every stage must be named."""
    lines = stage_lines(outcome)
    assert set(lines) == ALL, outcome.err
    return {title for title, how in lines.items() if how == "done"}


def facts_of(run: Path) -> Any:
    return json.loads((run / "nbl.json").read_text(encoding="utf-8"))


# -- reuse -----------------------------------------------------------------------------------------------------


def test_nothing_is_done_twice(same: Same, run: Path) -> None:
    before = snapshot(run)
    done = nbl(*same, "--output", run)
    assert set(stage_lines(done).values()) == {"reused"}
    assert list(stage_lines(done)) == list(TITLES.values())
    after = snapshot(run)
    command = facts_of(run).pop("command")
    assert str(run) in command  # the copy is another place than the original, and says so
    assert {n: h for n, h in after.items() if n != "nbl.json"} == {n: h for n, h in before.items() if n != "nbl.json"}
    nbl(*same, "--output", run)
    assert snapshot(run) == after


@pytest.fixture
def quick(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages behind the text that copy what a real run left: only the question which of them run is left."""

    def copy(stage: str, _inputs: Any, _place: Any, out: Path) -> dict[str, Any]:
        for name in facts_of(finished)["stages"][stage]["files"]:
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(finished / name, out / name)
        return {"status": "verified"} if stage in ("verify", "bench", "report") else {}

    monkeypatch.setattr(pipeline, "_tell", lambda *_: None)  # it reads facts that these stages do not find
    text, *others = pipeline.STAGES
    stages = (dataclasses.replace(stage, run=functools.partial(copy, stage.name)) for stage in others)
    monkeypatch.setattr(pipeline, "STAGES", (text, *stages))


# Every option: `test_stage_keys`.
CHANGES: dict[str, set[str]] = {
    "--layers 2": {"plan", *GRAPH},
    "logits=all": {"plan", "decoder graph", *GRAPH},  # what the top of the stack saves is another
    "--layers 1": set(),  # what a quarter of three layers is
    "--precision int4 builder_option=block_size=64": {"decoder graph", *GRAPH},
    "context=32": ALL,  # int8 rounds by moments of the text
    "--depth 0,8": MEASURING,
    "--depth 0": set(),
    "--layers 2 --precision int4": {"plan", "decoder graph", *GRAPH},
    "--force": ALL,
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("change", CHANGES)
def test_changed_options_run_the_stages_they_touch(change: str, same: Same, run: Path) -> None:
    flags, _, file = change.rpartition(" ") if "=" in change else (change, "", "")
    name, _, value = file.partition("=")
    in_file = {name: int(value) if value.isdigit() else value} if file else {}
    words = (*flags.split(), *(configured(**in_file) if file else ()))
    done = nbl(*same, *words, "--output", run)
    assert (done.status, ran(done)) == (0, CHANGES[change]), done.err
    again = nbl(*same, *words, "--output", run)
    assert ran(again) == (ALL if change == "--force" else set()), again.err
    assert facts_of(run)["status"] == "verified"
    if change != "--force":
        back = nbl(*same, "--output", run)
        assert ran(back) == CHANGES[change], back.err


@pytest.mark.usefixtures("quick")
def test_changed_text_and_moved_model(same: Same, run: Path, checkpoint: Any, text: Path, tmp_path: Path) -> None:
    """What counts is what is in the files, not where they are."""
    shutil.copytree(checkpoint("llama"), tmp_path / "other place")
    moved = ("--model", tmp_path / "other place")
    assert ran(nbl(*same, *moved, "--output", run)) == set()
    assert facts_of(run)["model"]["name"] == str(tmp_path / "other place")
    (tmp_path / "same.txt").write_bytes(text.read_bytes())
    other = [tmp_path / "same.txt" if word == text else word for word in same]
    assert ran(nbl(*other, "--output", run)) == set()
    (tmp_path / "same.txt").write_bytes(text.read_bytes()[1:])
    assert ran(nbl(*other, "--output", run)) == ALL


FILES = {
    "sums.safetensors": ALL - {"decoder graph"},
    "maps.safetensors": {"plan", *GRAPH},
    "original/model.onnx.data": {"decoder graph", *GRAPH},
    "original/tokenizer.json": {"decoder graph", *GRAPH},
    "original/all_logits.onnx": {"decoder graph", *GRAPH},
    "model/model.onnx": GRAPH,
    "model/all_logits.onnx": GRAPH,
    "model/nbl.json": GRAPH,
    "verify.json": {"verify", "report"},
    "bench.json": MEASURING,
    "report.html": {"report"},
    "report.json": {"report"},
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_made_again(name: str, same: Same, run: Path) -> None:
    before = snapshot(run)
    (run / name).unlink()
    done = nbl(*same, "--output", run)
    assert (done.status, ran(done)) == (0, FILES[name]), done.err
    after = snapshot(run)
    assert {n for n in before if before[n] != after[n]} <= {"nbl.json"}


def test_change_and_subcommand_for_real(same: Same, run: Path) -> None:
    """Options given to a subcommand are recorded, and the main job with the same ones reuses its work."""
    done = nbl("rewrite", run, *keys(layers="0,2"))
    assert stage_lines(done) == {
        "calibrate": "reused", "plan": "done", "decoder graph": "reused", "rewrite": "done",
    }, done.err  # fmt: skip
    assert facts_of(run)["status"] == "incomplete"
    assert "--layers 0,2" in facts_of(run)["command"]
    done = nbl(*same, "--layers", "0,2", "--output", run)
    assert ran(done) == {"verify", *MEASURING}, done.err
    assert facts_of(run)["status"] == "verified"
    assert facts_of(run)["replaced_layers"] == [0, 2]


def test_model_is_gone_after_the_run(same: Same, run: Path, checkpoint: Any, tmp_path: Path) -> None:
    """What needs it says so; what does not goes on."""
    copy = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    assert nbl(*same, "--model", copy, "--output", run).status == 0
    shutil.rmtree(copy)
    before = snapshot(run)
    assert_refused(nbl(*same, "--model", copy, "--output", run), 1, "no model at", copy)
    assert_refused(nbl(*same, "--model", copy, "--output", run, "--force"), 1, "no model at", copy)
    assert snapshot(run) == before
    for arguments in (
        ("bench", run, "--repetitions", 2), ("report", run),
        ("plan", run, "--layers", 2, *keys(select="cca")), ("rewrite", run)
    ):  # fmt: skip
        done = nbl(*arguments)
        assert done.status == 0, done.err
    assert_refused(nbl("verify", run), 1, "no model at", copy)
    shutil.copytree(checkpoint("mistral"), copy)
    assert_refused(nbl("verify", run), 1, copy, "is not the model that", "restore it")


# -- interruption ------------------------------------------------------------------------------------------------


MORE, NORMED = ("--calibration-tokens", 2048), configured(tap="normed")
ENDLESS = ("--config", Path(__file__).parents[1] / "endless.toml")
FAREWELL = "nbl-export: interrupted; finished stages are kept, and the same command continues after them"

# A calibration that only a signal ends. The file is there as soon as a stage has finished a part of its work.
ENDLESS_CALIBRATION = """
import contextlib, pathlib
from nbl_export.methods.linear import collect
from nbl_export.run import progress
batches, task = collect.batches, progress.Ui.task
collect.batches = lambda windows: batches(windows) * 100_000
@contextlib.contextmanager
def noted(ui, name):
    with task(ui, name) as tell:
        def update(done, total):
            tell(done, total)
            if done:
                pathlib.Path({file!r}).touch()
        yield update
progress.Ui.task = noted
"""


# The tests may be a background job, which ignores Ctrl-C.
AS_MODULE = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("nbl_export", run_name="__main__")
"""


def wait_for_file(file: Path, process: Any) -> None:
    """Wait until a file is there; a process that ends before, or two minutes, are a failure."""
    end = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.001)


def but_notes(said: str) -> list[str]:
    """Lines on stderr; a slow machine says in others, which are indented, how far it is."""
    return [line for line in said.splitlines() if not line.startswith("  ")]


@pytest.mark.parametrize(
    ("number", "line", "delay", "more"),
    [
        (signal.SIGTERM, "calibrate ...", None, NORMED),
        (signal.SIGINT, "calibrate ...", 0.0, NORMED),
        (signal.SIGINT, "bench ...", 0.1, ENDLESS),  # while the child that measures memory starts
        pytest.param(signal.SIGINT, "bench ...", 0.3, ENDLESS, marks=pytest.mark.fuzz),
        (signal.SIGTERM, "bench ...", None, ENDLESS),
    ],
)
def test_interrupt(
    number: signal.Signals, line: str, delay: float | None, more: Same, same: Same, run: Path,
    server: ForkServer, tmp_path: Path,
) -> None:  # fmt: skip
    """One line, status 130, and everything as it was. No delay: as soon as the stage is in its work."""
    before, file = snapshot(run), tmp_path / "in its work"
    process = server.start(*same, *more, "--output", run, code=ENDLESS_CALIBRATION.format(file=str(file)))
    assert process.wait_for(line), process.err
    if delay is None:
        wait_for_file(file, process)
    else:
        time.sleep(delay)
    process.kill(number)
    assert process.status == 130, process.err
    assert but_notes(process.err)[-2:] == [line, FAREWELL]
    assert snapshot(run) == before
    assert not list(run.glob(".nbl-export-*"))


def test_interrupt_a_process_of_its_own(same: Same, run: Path, tmp_path: Path) -> None:
    """Ctrl-C as a terminal sends it, to the whole process group; the same command resumes."""
    (run / "bench.json").unlink()
    file = tmp_path / "in its work"
    code = f"{ENDLESS_CALIBRATION.format(file=str(file))}\n{AS_MODULE}"
    command = [sys.executable, "-c", code, *map(str, (*same, *ENDLESS)), "--output", str(run)]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, start_new_session=True) as process:
        try:
            wait_for_file(file, process)
        finally:
            os.killpg(process.pid, signal.SIGINT)
        out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert but_notes(said)[-2:] == ["bench ...", FAREWELL], said
    assert ran(nbl(*same, "--output", run)) == MEASURING


@pytest.mark.parametrize("read", [True, False], ids=["", "nobody reads"])
def test_interrupt_inside_code_that_is_made_of_a_string(read: bool, tmp_path: Path) -> None:
    """As dataclasses make their methods, at the import of a library; CPython forgets the exit status of -m then."""
    (tmp_path / "early.py").write_text(
        "import runpy, sys, nbl_export.cli.app\n"
        "nbl_export.cli.app.app.make_context = lambda *_: exec('print(1); raise KeyboardInterrupt')\n"
        "sys.argv = ['nbl-export']\n"
        "runpy.run_module('nbl_export', run_name='__main__')\n"
    )
    command, held = (
        [sys.executable, "-m", "early"],
        {**os.environ, "PYTHONUNBUFFERED": ""},
    )  # output waits for its flush
    with subprocess.Popen(command, cwd=tmp_path, env=held, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        if not read:
            process.stdout.close()
        said, out = process.stderr.read(), process.stdout.read() if read else ""
    assert (process.returncode, out, said) == (130, "1\n" if read else "", f"{FAREWELL}\n")


@pytest.mark.usefixtures("ctrl_c")
def test_interrupt_that_a_library_makes_an_error_of(same: Same, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the import of an extension module does."""
    from nbl_export.targets.onnx.engine import OrtEngine

    def probe(_self: OrtEngine) -> Availability:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            return Availability(False, "the package is not installed")
        return Availability(True, "")

    monkeypatch.setattr(OrtEngine, "probe", probe)
    done = nbl(*same, "--output", run)
    assert (done.status, done.err) == (130, f"{FAREWELL}\n")


def test_interrupted_first_run_goes_on(same: Same, tmp_path: Path, server: ForkServer) -> None:
    """Also where not even the first stage was finished."""
    run = tmp_path / "run"
    process = server.start(*same, *MORE, "--output", run)
    assert process.wait_for("calibrate ...")
    process.kill(signal.SIGINT)
    assert process.status == 130, process.err
    assert {p.name for p in run.iterdir()} == {".lock", "nbl.json", "text.safetensors"}
    assert json.loads(nbl("inspect", run, "--json").out)["status"] == "incomplete"
    assert_refused(nbl("generate", run, "Hi"), 1, run, "not finished", "--calibration-tokens 2048")
    done = nbl("calibrate", *same[:4], *same[6:], "--output", run)  # without --config
    assert stage_lines(done) == {"calibrate": "done"}, done.err


def assert_whole(run: Path) -> None:
    """Every stage on record has its files, unharmed."""
    found = RunDirectory.peek(run)
    for stage in found.manifest.get("stages", {}):
        found.check(stage)


def assert_equal_runs(run: Path, undisturbed: Path) -> None:
    """The same files; the same bytes but for times and timings."""
    ours, theirs = snapshot(run), snapshot(undisturbed)
    assert set(ours) == set(theirs)
    timed = {"nbl.json", "bench.json", "report.html", "report.md", "report.json"}
    assert {n for n in ours if ours[n] != theirs[n]} <= timed
    assert facts_of(run)["status"] == "verified"
    assert not list(run.glob(".nbl-export-*"))


def _moments_of(run: Path) -> list[tuple[str, float]]:
    """Fifty: seven spread over each stage, as long as it took, and one where a stage has just ended."""
    seconds = {title: facts_of(run)["stages"][stage]["seconds"] for stage, title in TITLES.items()}
    spread = [(f"{title} ...", s * k / 8) for title, s in seconds.items() for k in range(7)]
    return [*spread, ("rewrite: done", 0.0)]


@pytest.mark.fuzz
def test_kill_at_fifty_moments(same: Same, finished: Path, tmp_path: Path, server: ForkServer) -> None:
    """Each time a new run: killed once, what is on record is whole, and the same command ends at the same bytes."""
    moments = _moments_of(finished)
    assert len(moments) == 50
    for number, (line, delay) in enumerate(moments):
        run = tmp_path / f"run-{number}"
        status = None
        while status != -signal.SIGKILL:  # a stage that was quicker this time: again, earlier
            shutil.rmtree(run, ignore_errors=True)
            process = server.start(*same, "--output", run)
            assert process.wait_for(line), process.err
            time.sleep(delay)
            process.kill()
            status, delay = process.status, delay * 0.7
        assert_whole(run)
        done = nbl(*same, "--output", run)
        assert done.status == 0, (line, delay, done.err)
        assert_equal_runs(run, finished)
        shutil.rmtree(run)


# Kills itself when the given file is about to be renamed into its place, or has just been.
_KILL_AT_RENAME = """
import os, signal
replace = os.replace
def replace_and_die(source, target):
    if os.path.basename(target) == {name!r}:
        {last}
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_and_die
"""


@pytest.mark.fuzz
def test_kill_while_results_move_into_place(same: Same, run: Path, finished: Path, server: ForkServer) -> None:
    """With older results of other options in that place."""
    assert nbl("rewrite", run, *keys(layers="0,2", precision="int8")).status == 0
    before, after = "pass", "replace(source, target)"
    for name, last in (
        ("maps.safetensors", after), ("original", before), ("model", after), ("verify.json", after),
        ("bench.json", before), ("report.md", after),
    ):  # fmt: skip
        code = _KILL_AT_RENAME.format(name=name, last=last)
        process = server.start(*same, "--output", run, code=code)
        assert process.status == -signal.SIGKILL, (name, process.err)
        assert_whole(run)
    done = nbl(*same, "--output", run)
    assert done.status == 0, done.err
    assert_equal_runs(run, finished)
