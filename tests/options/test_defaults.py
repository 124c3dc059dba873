"""Every way to a job settles its options alike, refuses before anything is written, and repeats from its own command.

flags, --config FILE, a stage of a run, a run's nbl.json, Python ─► one settling ─► the options of the job
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import UsageError
from nbl_export.options.command import describe_command
from nbl_export.options.options import OPTIONS, RENAMED, JobOptions, flag_of
from nbl_export.options.settle import settle
from nbl_export.run import pipeline
from nbl_export.run import settled as run_settled
from nbl_export.run.progress import Ui
from nbl_export.run.settled import capabilities_of
from nbl_export.run_directory import RunDirectory

from ..command import assert_refused, in_new_process, keys, nbl, repeated
from .test_settle import assert_settled, settled

pytestmark = [pytest.mark.job, pytest.mark.process]

Recorded = Callable[..., Path]
QUIET = Ui(quiet=True)
# Options that change other options, and one that has no effect beside them.
ASKED: dict[str, Any] = {"engine": "openvino", "maps": "linear", "layers": "2"}
EXPECTED: dict[str, Any] = {"tap": "normed", "precision": "int8", "decoder_source": "openvino", "layers": "2"}
IDLE = {"seed": 3, "layers": "2"}


class _Reached(Exception):
    """A job got as far as its options."""

    def __init__(self, options: JobOptions) -> None:
        super().__init__(str(options))
        self.options = options


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs end when their options are settled for the first time."""

    def stop(*args: Any, **more: Any) -> JobOptions:
        raise _Reached(settle(*args, **more))

    monkeypatch.setattr(run_settled, "settle", stop)


def reached(call: Callable[[], object]) -> JobOptions:
    with pytest.raises(_Reached) as found:
        call()
    return found.value.options


def line(*words: object) -> Callable[[], object]:
    """The command line, in this process."""
    from nbl_export.cli import app

    return lambda: app.app([str(word) for word in words], standalone_mode=False)


def flags(asked: Mapping[str, Any]) -> list[str]:
    """As a user types them: keys in a file."""
    in_file = {name: value for name, value in asked.items() if OPTIONS[name].key}
    words = [word for name, value in asked.items() if name not in in_file for word in (flag_of(name), str(value))]
    return [*keys(**in_file), *words]


def written(directory: Path, asked: Mapping[str, Any]) -> Path:
    file = directory / "asked.toml"
    file.write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in asked.items()), encoding="utf-8")
    return file


MANIFEST: dict[str, Any] = {
    "schema": 1, "status": "incomplete", "stages": {}, "command": "", "num_layers": 3,
    "replaced_layers": [1], "tap": "residual",
    "model": {"name": "m", "title": "m", "revision": None, "architecture": "llama", "fingerprint": "f"},
    "decoder": {"architecture": "llama", "num_layers": 3, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2,
                "head_dim": 16, "vocab_size": 512, "max_positions": 512},
    "sources": [],
    "places": {"model": "/nowhere/m", "calibration": []},
}  # fmt: skip


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    """options -> a run directory that records them, and holds nothing else."""

    def make(place: str = "/nowhere/m", **asked: Any) -> Path:
        directory = tmp_path / "recorded"
        directory.mkdir(exist_ok=True)
        options = settle({"model": "m", "depth": "0", **asked}, capabilities_of)
        places = {**MANIFEST["places"], "model": place}
        RunDirectory(directory).save(**{**MANIFEST, "places": places, "options": options.to_json()})
        return directory

    return make


# -- roads --------------------------------------------------------------------------------------------------------


def test_ways_to_a_new_run(tmp_path: Path, stopped: None) -> None:
    out = tmp_path / "out"
    roads: dict[str, Callable[[Mapping[str, Any]], Callable[[], object]]] = {
        "flags": lambda a: line("--model", "m", *flags(a), "--output", out),
        "config": lambda a: line("--model", "m", "--config", written(tmp_path, a), "--output", out),
        "python": lambda a: lambda: pipeline.run_job({"model": "m", **a}, out, QUIET),
    }
    for name, road in roads.items():
        assert_settled(reached(road(ASKED)), EXPECTED)
        with pytest.raises(UsageError, match=r"^key seed is for --fit distilled; leave key seed"):
            road(IDLE)()
        if name != "flags":  # the command line refuses it
            with pytest.raises(UsageError, match="precison is no option; did you mean precision"):
                road({"precison": "int4"})()
    assert not out.exists()


def test_ways_to_a_changed_run(recorded: Recorded, tmp_path: Path, stopped: None) -> None:
    directory = recorded(fit="distilled", distill_steps=4)
    before = (directory / "nbl.json").read_bytes()
    found = reached(line("plan", directory, "--fit", "independent", "--layers", 2))
    assert_settled(found, {"tap": "residual", "distill_steps": None, "layers": "2"})
    found = reached(line("calibrate", "--model", "m", "--output", directory, "--calibration-tokens", 64))
    assert_settled(found, {"tap": "normed", "fit": "distilled", "distill_steps": 4, "calibration_tokens": 64})
    new = tmp_path / "new"
    found = reached(line("--config", directory / "nbl.json", "--fit", "independent", "--output", new))
    assert_settled(found, {"model": "/nowhere/m", "tap": "residual", "distill_steps": None})
    with pytest.raises(UsageError, match=r"^key select is for "):
        line("plan", directory, "--layers", "0,2", *keys(select="cca"))()
    with pytest.raises(UsageError, match=r"^key max_batch is for "):
        line("build", directory, *keys(max_batch=2))()
    with pytest.raises(UsageError, match=r"toml: context is no option of plan$"):
        line("plan", directory, *keys(context=32))()
    assert (directory / "nbl.json").read_bytes() == before and not new.exists()


def test_a_refusal_reaches_the_user(recorded: Recorded, tmp_path: Path) -> None:
    """Before the model is looked for, which is nowhere; and the directory stays as it is."""
    out = tmp_path / "out"
    part = "key seed is for --fit distilled; leave key seed out"
    assert_refused(nbl("--model", "nowhere", "--layers", 2, *keys(seed=3), "--output", out), 2, part)
    assert_refused(nbl("--model", "nowhere", "--layers", 2, "--output", out), 1, "no model at nowhere")
    directory = recorded()
    before = (directory / "nbl.json").read_bytes()
    assert_refused(nbl("plan", directory, "--layers", 3), 1, "--layers 3 would replace all 3 attention layers")
    given = nbl("rewrite", directory, *keys(decoder_source="given"))
    assert_refused(given, 2, "key decoder_source given is not for engine")
    assert (directory / "nbl.json").read_bytes() == before and not out.exists()


def test_engines_that_cannot_make_the_run(recorded: Recorded, tmp_path: Path) -> None:
    done = nbl("build", recorded(), "--engine", "trt")
    assert_refused(done, 1, "is a run for --engine ort", "make another run with --engine trt or trt-rtx")


def test_options_are_settled_without_torch(tmp_path: Path) -> None:
    watch = "import atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))"
    done = in_new_process("--model", tmp_path, "--layers", "abc", "--output", tmp_path / "out", code=watch)
    assert (done.status, done.err.splitlines()[-1]) == (2, "False")
    assert "'abc' is not a layer" in done.err


# -- the recorded command -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        {}, ASKED, {"fit": "distilled"}, {"fit": "distilled", "tap": "residual"}, {"provider": "cuda"},
        {"engine": "openvino", "precision": "fp32"}, {"engine": "openvino", "fit": "independent", "layers": "2"},
        {"for": "mlx-lm", "layers": "2"}, {"precision": "fp16"},
        {"maps": "linear", "layers": "2", "select": "cca"},
        {"fit": "distilled", "distill_steps": 4, "seed": 2, "label_weight": 0.5},
        {"engine": "trt-rtx", "precision": "int4", "max_seq_len": 64},
        {"precision": "int4", "builder_option": ("block_size=64",)},
    ],
    ids=str,
)  # fmt: skip
def test_the_recorded_command_settles_alike(asked: dict[str, Any], tmp_path: Path, stopped: None) -> None:
    options = settled(asked)
    assert reached(line(*repeated(describe_command(options, tmp_path / "out")))) == options


# -- names that options had ----------------------------------------------------------------------------------------


def test_an_old_name_is_answered_with_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every road, in one sentence; the old name is no option beside it."""
    monkeypatch.setitem(RENAMED, "prefill_layers", "layers")
    monkeypatch.setitem(RENAMED, "old_seed", "seed")  # a key
    out = tmp_path / "out"
    for command in (("--model", "m", "--output", out), ("plan", tmp_path)):
        refused = nbl(*command, "--prefill-layers", 8)
        assert_refused(refused, 2)
        assert refused.err == "nbl-export: --prefill-layers has another name now; write --layers\n"
        assert_refused(nbl(*command, "--old-seed", 8), 2, "--old-seed has another name now; write key seed")
    for name in ("prefill_layers", "prefill-layers"):
        sentence = f"{name} has another name now; write layers"
        file = written(tmp_path, {name: 8})
        assert_refused(nbl("--model", "m", "--config", file, "--output", out), 2, f"{file}: {sentence}")
        with pytest.raises(UsageError, match=f"^{sentence}$"):
            pipeline.run_job({"model": "m", name: 8}, out, QUIET)
    assert not out.exists()


def test_no_option_has_an_old_name() -> None:
    assert not RENAMED.keys() & OPTIONS.keys()
    assert OPTIONS.keys() >= set(RENAMED.values())
