"""Output that cannot be had, run directories that were tampered with, and verification that fails.

One sentence, the right exit status, and what is there stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nbl_export.methods.linear.maps import Linear

from ..command import TINY, assert_refused, configured, nbl, snapshot, stage_lines
from ..damage import edit, flip, truncate
from ..jobs import until

pytestmark = [pytest.mark.job, pytest.mark.process]

Same = tuple[object, ...]


# -- the output ------------------------------------------------------------------------------------------------


def test_output_that_cannot_be_written(same: Same, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at all")
    long = tmp_path / ("x" * 300)
    not_utf8 = tmp_path / os.fsdecode(b"\xff")
    for output in (
        tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nbl-export"), long, tmp_path / "dangling",
    ):  # fmt: skip
        assert_refused(nbl(*same, "--output", output), 1, output.name, "choose another --output")
    assert_refused(nbl(*same, "--output", not_utf8), 1, "UTF-8", "choose another --output")
    assert (tmp_path / "file").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"file", "dangling"}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permission bits do not bind root")
def test_output_without_permission(same: Same, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert_refused(nbl(*same, "--output", tmp_path / "run"), 1, "no permission", "choose another directory")
    finally:
        tmp_path.chmod(0o700)


OTHERS = ("notes.txt", "model/weights.bin", "checkpoint/config.json", "bench.json", ".git/HEAD",
          ".tmp-mine/thesis.txt", ".nbl-export-mine/thesis.txt", ".nbl-export-abcdefgh")  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_directory_with_other_things_in_it(name: str, same: Same, tmp_path: Path) -> None:
    """Also where they are called as ours would be."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    for force in ((), ("--force",)):
        refused = nbl(*same, "--output", tmp_path, *force)
        assert_refused(refused, 1, tmp_path, "not empty and not a run directory", name.partition("/")[0])
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [Path(name).name]


def test_directory_inside_a_run(same: Same, run: Path) -> None:
    before = snapshot(run)
    for force in ((), ("--force",)):
        assert_refused(nbl(*same, "--output", run / "model", *force), 1, run / "model", "choose another --output")
    assert nbl("inspect", run / "model").status == 0  # a graph is inspected wherever it lies
    for command in ("report", "plan"):
        assert_refused(nbl(command, run / "model"), 1, run / "model", "is a model directory")
    assert snapshot(run) == before


def test_output_of_another_model(checkpoint: Any, text: Path, run: Path) -> None:
    given = ("--model", checkpoint("mistral"), "--calibration", text, *TINY, "--output", run)
    before = snapshot(run)
    assert_refused(nbl(*given), 1, run, "holds a run of", "use another --output", "--force")
    assert_refused(nbl("calibrate", *given[:4], "--output", run), 1, "holds a run of")
    assert snapshot(run) == before


@pytest.mark.parametrize("command", ["plan", "rewrite", "verify", "bench", "report", "inspect", "generate"])
def test_subcommand_on_no_run_directory(command: str, tmp_path: Path) -> None:
    more = ("Hi",) if command == "generate" else ()
    assert_refused(nbl(command, tmp_path / "none", *more), 1, tmp_path / "none", "run directory", "--output")
    assert_refused(nbl(command, tmp_path, *more), 1, tmp_path, "run directory", "--output")
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def holding(run: Path) -> Iterator[None]:
    """Another process that has the run directory open."""
    lock = f"filelock.FileLock({str(run / '.lock')!r})"
    script = f"import filelock, sys\nwith {lock}: print(1, flush=True), sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline()
        yield
        other.communicate()


def test_two_at_once(same: Same, run: Path) -> None:
    before = snapshot(run)
    with holding(run):
        for arguments in ((*same, "--output", run), (*same, "--output", run, "--force"), ("bench", run), ("plan", run)):
            assert_refused(nbl(*arguments), 1, run, "in use by another nbl-export", "wait")
        assert nbl("inspect", run).status == 0  # looking on is no harm
    assert snapshot(run) == before
    assert nbl("report", run).status == 0


# -- a full disk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kilobytes", "missing"),
    [
        (1, "report.md"), (20, "report.md"), (4, "maps.safetensors"), (200, "sums.safetensors"),
        (200, "original/model.onnx"), (200, "model/model.onnx"),
    ],
)  # fmt: skip
def test_file_size_limit(kilobytes: int, missing: str, run: Path) -> None:
    """As a full disk: a write fails in the middle, of the manifest, a report, maps, moments, or a graph's data."""
    (run / missing).unlink()
    before = snapshot(run)
    with limited_files(kilobytes):
        refused = nbl("report", run)
    assert_refused(refused, 1, run, "choose another directory")  # `report` has no --output
    assert snapshot(run) == before
    assert not list(run.glob(".nbl-export-*"))
    if missing in ("report.md", "maps.safetensors"):
        assert nbl("report" if missing == "report.md" else "rewrite", run).status == 0


@contextlib.contextmanager
def limited_files(kilobytes: int) -> Iterator[None]:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kilobytes", [4, 480, 1420])
def test_full_disk(kilobytes: int, same: Same, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, in the decoder graph, in rewrite. Once there is space, the same command goes on.

    Another program takes the space after the job has seen that there is enough.
    """
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1 << 40))
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here; test_file_size_limit stands in")
    try:
        run = disk / "run"
        assert_refused(nbl(*same, "--output", run), 1, run, "no space left", "choose another directory")
        assert not list(run.glob(".nbl-export-*"))
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        with until("rewrite"):
            done = nbl(*same, "--output", run)
        assert done.status == 0, done.err
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # a session that is not collected yet may hold a file


# -- a run directory that was tampered with ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("sums.safetensors", "calibrate"), ("maps.safetensors", "plan"), ("original/model.onnx", "decoder"),
        ("original/model.onnx.data", "decoder"), ("model/model.onnx", "rewrite"), ("model/model.onnx.data", "rewrite"),
        ("model/tokenizer.json", "rewrite"), ("verify.json", "verify"), ("bench.json", "bench"),
    ],
)  # fmt: skip
def test_flipped_byte(name: str, stage: str, same: Same, run: Path) -> None:
    flip(run / name)
    before = snapshot(run)
    parts = (run / name, "is corrupted", stage, "delete it", "--force")
    assert_refused(nbl(*same, "--output", run), 1, *parts)
    assert_refused(nbl("report", run), 1, *parts)
    if name.startswith("model/"):
        assert_refused(nbl("generate", run, "Hi"), 1, *parts)
    assert snapshot(run) == before
    (run / name).unlink()  # as the message says
    done = nbl("rewrite" if stage in ("calibrate", "plan", "decoder", "rewrite") else "report", run)
    assert stage_lines(done)["decoder graph" if stage == "decoder" else stage] == "done", done.err


def test_missing_file_of_the_graph(run: Path) -> None:
    (run / "model" / "model.onnx.data").unlink()
    assert_refused(nbl("generate", run, "Hi"), 1, run / "model" / "model.onnx.data", "is missing", "run")
    assert_refused(nbl("generate", run / "model", "Hi"), 1, run / "model")


def inside(name: str, **values: Any) -> Callable[[Path], object]:
    """Change values of an object of the manifest."""
    return lambda path: edit(path, **{name: {**json.loads(path.read_text())[name], **values}})


MANIFESTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "truncated": (lambda p: truncate(p, 500), ("cannot be read", "restore it", "--force")),
    "binary": (lambda p: p.write_bytes(b"\xff\xfe\0"), ("cannot be read", "restore it", "--force")),
    "list": (lambda p: p.write_text("[]"), ("not a manifest", "restore it", "--force")),
    "no stages": (lambda p: edit(p, stages=None), ("not a manifest", "restore it", "--force")),
    "option of a wrong kind": (lambda p: edit(p, options={"model": "m", "context": "x"}), ("not a manifest",)),
    "options of no engine": (lambda p: edit(p, options={"model": "m"}), ("not a manifest", "'engine'")),
    "half a token": (inside("options", generate_tokens=4.5), ("not a manifest", "'generate_tokens'")),
    "a decoder without heads": (inside("decoder", num_kv_heads=0), ("not a manifest", "at least 1")),
    "no such layer": (lambda p: edit(p, replaced_layers=[7]), ("not a manifest", "restore it", "--force")),
    "a kind of nobody": (lambda p: edit(p, kinds=["lin"]), ("not a manifest", "'kinds' are of linear")),
    "more layers than the decoder": (lambda p: edit(p, num_layers=1 << 40), ("not a manifest", "'num_layers'")),
    "future": (lambda p: edit(p, schema=99), ("has schema 99", "this version reads 1", "--force")),
    "future without stages": (lambda p: edit(p, schema=2, stages=None), ("has schema 2", "this version reads 1")),
}  # fmt: skip


@pytest.mark.parametrize("case", MANIFESTS)
def test_damaged_manifest(case: str, same: Same, run: Path) -> None:
    damage, parts = MANIFESTS[case]
    damage(run / "nbl.json")
    before = snapshot(run)
    for arguments in ((*same, "--output", run), ("report", run), ("inspect", run), ("generate", run, "Hi")):
        assert_refused(nbl(*arguments), 1, run / "nbl.json", *parts)
    assert snapshot(run) == before


def test_text_without_one_of_its_parts_is_refused(run: Path, tmp_path: Path) -> None:
    facts = json.loads((run / "nbl.json").read_text())["text"]
    parts = {name: found for name, found in facts["parts"].items() if name != "held_out"}
    edit(run / "nbl.json", text={**facts, "parts": parts})
    done = nbl("convert", run, "--to", "edge-llm", "--output", tmp_path / "out")
    assert_refused(done, 1, run, "records no held_out part of its text", "--force")


def test_damaged_manifest_is_forgotten_with_force(same: Same, run: Path) -> None:
    (run / "nbl.json").write_text("{")
    done = nbl("calibrate", *same[:4], *same[6:], "--output", run, "--force")
    assert done.status == 0, done.err
    assert {p.name for p in run.iterdir()} == {".lock", "nbl.json", "text.safetensors", "sums.safetensors"}


@pytest.mark.parametrize("manifest", ["{}", '{"schema": 1, "stages": {}, "model": {}}', "[]", "{"])
def test_force_removes_nothing_beside_a_manifest_of_others(manifest: str, same: Same, tmp_path: Path) -> None:
    for name, content in {"nbl.json": manifest, "model/thesis.txt": "mine", "original/a": "mine"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    before = snapshot(tmp_path)
    for arguments in (same, ("calibrate", *same[:4], *same[6:])):
        refused = nbl(*arguments, "--output", tmp_path, "--force")
        assert_refused(refused, 1, tmp_path / "nbl.json", "--force removes nothing")
    assert snapshot(tmp_path) == before


def test_a_folder_checkpoint_of_others_stays(same: Same, run: Path) -> None:
    for name in ("thesis.txt", "config.json"):
        (run / "checkpoint" / name).parent.mkdir(exist_ok=True)
        (run / "checkpoint" / name).write_text("mine")
    assert nbl("report", run).status == 0
    assert nbl("calibrate", *same[:4], *same[6:], "--output", run, "--force").status == 0
    assert len(list((run / "checkpoint").iterdir())) == 2
    (run / "checkpoint" / "source.json").write_text("{}")  # as a conversion leaves it
    assert nbl("calibrate", *same[:4], *same[6:], "--output", run, "--force").status == 0
    assert not (run / "checkpoint").exists()


# -- verification that fails ------------------------------------------------------------------------------------


@pytest.fixture
def transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewrite that puts the maps in the wrong way round."""
    from nbl_export.methods import rewrite

    correct = rewrite.rewrite_model

    def wrong(model: Any, maps: dict[int, Linear], *more: Any) -> Any:
        turned = {i: Linear(np.ascontiguousarray(m.weight.T), m.bias) for i, m in maps.items()}
        return correct(model, turned, *more)

    monkeypatch.setattr(rewrite, "rewrite_model", wrong)


_SHORT = ("--depth", 0, "--repetitions", 1, "--prompt-tokens", 8, "--generate-tokens", 3)


@pytest.mark.usefixtures("transposed")
def test_failed_verification(same: Same, run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "model" / "model.onnx").unlink()
    failed = nbl(*same, "--output", run)
    assert_refused(failed, 3, "verification failed", run, "check", "(nbl", "allowed", "kept for inspection")
    assert list(stage_lines(failed)) == ["calibrate", "plan", "decoder graph", "rewrite", "verify"]
    assert (run / "model" / "model.onnx").is_file()
    assert "failed" in (run / "report.html").read_text(encoding="utf-8").lower()
    assert json.loads((run / "report.json").read_text())["status"] == "failed"
    assert json.loads(nbl("inspect", run, "--json").out)["status"] == "failed"

    assert_refused(nbl("generate", run, "Hi"), 1, run, "failed verification", "--force")
    assert nbl("generate", run, "Hi", "--max-new-tokens", 2, "--force").status == 0
    assert nbl("generate", run, "Hi", "--max-new-tokens", 2, "--original").status == 0
    saved = run.with_name("saved")
    words = (("bench", run, finished / "model", *_SHORT), ("convert", run, "--to", "transformers", "--output", saved))
    for given in words:
        assert_refused(nbl(*given), 1, run, "failed verification", "--force")
        assert nbl(*given, "--force").status == 0
    assert_refused(nbl("bench", run), 3, "verification failed")
    forced = nbl("bench", run, "--force")
    assert forced.status == 0, forced.err
    assert stage_lines(forced)["verify"] == "reused"
    result = json.loads((run / "report.json").read_text())
    assert (result["status"], len(result["rows"])) == ("failed", 4)
    assert json.loads((run / "nbl.json").read_text())["status"] == "failed"
    assert_refused(nbl("generate", run, "Hi"), 1, "failed verification")
    again = nbl("verify", run)
    assert_refused(again, 3, "verification failed")
    assert stage_lines(again)["verify"] == "done"  # tried again, not believed

    monkeypatch.undo()
    (run / "model" / "model.onnx").unlink()
    with until("verify"):
        done = nbl(*same, "--output", run)
    assert done.status == 0, done.err
    assert json.loads((run / "nbl.json").read_text())["status"] == "verified"


# -- the machine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (OSError(5, "Input/output error", "/disk/file"), "/disk/file: Input/output error"),
    ],
    ids=["Python", "torch", "disk"],
)
def test_machine_that_gives_up(
    error: Exception, words: str, run: Path, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbl_export.methods.linear import collect

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(collect.Collection, "add", fail)
    before = snapshot(run)
    assert_refused(nbl(*same, *configured(tap="normed"), "--output", run), 1, words)
    assert snapshot(run) == before
