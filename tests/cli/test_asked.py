"""An option that has no effect is refused, and a default that depends on other options is the same on every road.

flags, --config FILE, a stage of a run, a run's nbl.json, Olive, Python ─► one settling ─► the options of the job
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shlex
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import NblError, UsageError
from nbl_export.records.asked import (
    ALWAYS,
    RULES,
    Case,
    flag_of,
    read_asked,
    refuse_idle,
    settle,
)
from nbl_export.records.goals import CacheBudget, layers_for_budget
from nbl_export.records.option import MAIN, options_of
from nbl_export.records.options import JobOptions, describe_command
from nbl_export.records.plan import Plan
from nbl_export.run import pipeline
from nbl_export.run.preflight import engine_defaults, preflight
from nbl_export.run.progress import Ui
from nbl_export.run_directory import RunDirectory

from ..command import assert_refused, in_new_process, nbl

OPTIONS = options_of(JobOptions)

# An option that has no effect -> its value, the options beside it, and what the message names.
IDLE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "select": ("cca", {"layers": "0,2"}, "a number of layers or a goal"),
    "rank": ("8", {"fit": "drop"}, "--fit independent"),
    "maps": ("linear", {"fit": "drop"}, "fitted maps"),
    "distill_minutes": (1.0, {}, "--fit distilled"),
    "distill_steps": (40, {}, "--fit distilled"),
    "distill_tokens": (2048, {"fit": "independent"}, "--fit distilled"),
    "lora_rank": (16, {"fit": "drop"}, "--fit distilled"),  # the default, but asked for
    "label_weight": (0.5, {}, "--fit distilled"),
    "seed": (3, {}, "--calibration self"),
    "requantize": (True, {"precision": "int4"}, ".gguf"),
    "provider": ("cpu", {"engine": "openvino"}, "--engine ort"),
    "max_seq_len": (64, {}, "trt"),
    "max_batch": (2, {"engine": "openvino"}, "trt"),
    "prefill_chunk": (16, {}, "trt"),
    "builder_option": (("block_size=32",), {"decoder_source": "mobius"}, "--decoder-source genai"),
    "quantize": ("rtn", {}, "--precision int4"),
    "quantized_model": ("x", {"precision": "int8"}, "--precision int4"),
    "draft": ("ngram", {"engine": "trt-rtx"}, "ort and openvino"),
    "draft_layers": ("2", {"draft": "ngram"}, "--draft nbl"),
    "threads": ((2,), {"engine": "trt-rtx"}, "compile nothing"),
    "batches": ((2,), {"engine": "trt-rtx"}, "compile nothing"),
}
# The same for options whose effect depends on the model.
OF_MODEL: dict[str, tuple[Any, Callable[[JobOptions], Case]]] = {
    "layers": ("1", lambda o: Case(o, is_nbl=True)),
    "max_perplexity_increase": ("5%", lambda o: Case(o, is_graph=True)),
    "target_speedup": ("1.3", lambda o: Case(o, is_nbl=True)),
    "kv_budget": ("1KiB", lambda o: Case(o, is_nbl=True)),
    "compute_dtype": ("bfloat16", lambda o: Case(o, is_graph=True)),
    "shard": ("1/2", lambda o: Case(o, is_nbl=True)),
}


def test_every_option_has_a_rule_or_applies_always() -> None:
    assert set(RULES) | set(ALWAYS) == set(OPTIONS)
    assert not set(RULES) & set(ALWAYS)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_tried(name: str) -> None:
    assert (name in IDLE) != (name in OF_MODEL)
    asked = {**IDLE[name][1], name: IDLE[name][0]} if name in IDLE else {name: OF_MODEL[name][0]}
    case = (lambda o: Case(o)) if name in IDLE else OF_MODEL[name][1]
    if "engine" in asked:
        engine = asked["engine"]
        case = lambda o: Case(o, compiles=engine == "trt-rtx", proposes=engine == "openvino")  # noqa: E731
    options = dataclasses.replace(JobOptions("m"), **asked)
    with pytest.raises(UsageError, match=f"^{flag_of(name)} is for "):
        refuse_idle(case(options), [name])


def words_of(name: str, value: Any) -> list[str]:
    if value is True:
        return [flag_of(name)]
    return [flag_of(name), *([",".join(map(str, value))] if isinstance(value, tuple) else [str(value)])]


def as_toml(directory: Path, asked: Mapping[str, Any]) -> Path:
    file = directory / "asked.toml"
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in asked.items()}
    file.write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items()), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", IDLE)
def test_an_option_without_effect_is_refused_on_every_road(name: str, tmp_path: Path) -> None:
    """Before the model is looked for, which is nowhere."""
    value, beside, part = IDLE[name]
    out = tmp_path / "out"
    flags = [word for n, v in {**beside, name: value}.items() for word in words_of(n, v)]
    parts = (f"{flag_of(name)} is for ", part, f"leave {flag_of(name)} out")
    if MAIN in OPTIONS[name].commands:
        assert_refused(nbl("--model", "nowhere", *flags, "--output", out), 2, *parts)
    file = as_toml(tmp_path, {**beside, name: value})
    assert_refused(nbl("--model", "nowhere", "--config", file, "--output", out), 2, *parts)
    with pytest.raises(UsageError, match=f"^{flag_of(name)} is for "):
        pipeline.run_job({"model": "nowhere", **beside, name: value}, out, Ui(quiet=True))
    assert not out.exists()


def test_a_job_without_idle_options_is_not_refused(tmp_path: Path) -> None:
    """It gets as far as the model."""
    for flags in (
        ("--fit", "distilled", "--distill-steps", 4, "--lora-rank", 2, "--seed", 1),
        ("--calibration", "self", "--seed", 1),
        ("--layers", "0,2", "--draft", "nbl", "--draft-layers", 2, "--select", "cca"),
        ("--layers", 2, "--select", "cca", "--rank", 8, "--provider", "cpu"),
        ("--precision", "INT4", "--quantize", "awq", "--builder-option", "block_size=32"),
    ):
        assert_refused(nbl("--model", "nowhere", *flags, "--output", tmp_path / "out"), 1, "no model at nowhere")


@pytest.mark.parametrize("word", ["block_size=32", "algo_config=rtn", "accuracy_level=1"])
def test_options_of_rounding_need_a_rounded_precision(word: str, tmp_path: Path) -> None:
    for precision, status, part in (
        ("fp32", 2, "--builder-option is for --precision int8, int4 or gguf"),
        ("int8", 1, "no model at nowhere"),
    ):
        words = ("--precision", precision, "--builder-option", word, "--builder-option", "fuse_mlp_gate_up=true")
        assert_refused(nbl("--model", "nowhere", *words, "--output", tmp_path / "out"), status, part)
    assert_refused(nbl("--model", "nowhere", *words[4:], "--output", tmp_path / "out"), 1, "no model at nowhere")


def test_an_nbl_checkpoint_refuses_what_needs_its_attention() -> None:
    for given in ({"rank": "2"}, {"maps": "linear"}, {"draft": "ngram"}, {"select": "cca"}):
        options: JobOptions = dataclasses.replace(JobOptions("m"), **given)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="no longer contains the removed attention"):
            refuse_idle(Case(options, proposes=True, is_nbl=True))


# -- names and values ---------------------------------------------------------------------------------------------


def test_names_and_values_are_read_alike() -> None:
    asked = {"layers": 8, "depth": "0,16", "prompt-tokens": 32, "calibration": "a.txt", "precision": "FP16"}
    assert read_asked(asked) == {
        "layers": "8", "depths": (0, 16), "prompt_tokens": (32,), "calibration": ("a.txt",), "precision": "fp16",
    }  # fmt: skip
    with pytest.raises(UsageError, match="precison is no option; did you mean precision"):
        read_asked({"precison": "fp16"})
    with pytest.raises(UsageError, match="'label_weight' is of the wrong kind"):
        settle({"model": "m", "label_weight": "much"}, engine_defaults)


# -- defaults that depend on other options ------------------------------------------------------------------------

SETTLED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"tap": "residual", "precision": "fp32", "decoder_source": "genai"}),
    ({"fit": "distilled"}, {"tap": "normed"}),
    ({"maps": "linear"}, {"tap": "normed"}),
    ({"fit": "distilled", "tap": "residual"}, {"tap": "residual"}),
    ({"engine": "openvino"}, {"precision": "fp16", "decoder_source": "openvino"}),
    ({"engine": "openvino", "precision": "int8"}, {"precision": "int8", "decoder_source": "openvino"}),
    ({"provider": "cuda"}, {"precision": "fp16", "decoder_source": "genai"}),
]


REPEATED: list[dict[str, Any]] = [
    *(asked for asked, _ in SETTLED),
    {"engine": "openvino", "precision": "fp32"},
    {"maps": "linear", "layers": "2", "select": "cca", "rank": "4"},
    {"fit": "distilled", "distill_steps": 4, "seed": 2, "label_weight": 0.5},
    {"engine": "trt-rtx", "precision": "int4", "max_seq_len": 64},
    {"precision": "int4", "quantize": "awq", "builder_option": ("block_size=64",), "draft": "nbl", "draft_layers": "1"},
]


class _Reached(Exception):
    """A job got as far as its options."""

    def __init__(self, options: JobOptions) -> None:
        super().__init__(str(options))
        self.options = options


def _stop(options: JobOptions, *_: object) -> None:
    raise _Reached(options)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs end when their options are settled."""
    monkeypatch.setattr(pipeline, "_work", _stop)
    monkeypatch.setattr(pipeline, "_advance", lambda job, *_, **__: _stop(job.options))
    monkeypatch.setattr(pipeline, "require_engine", lambda *_, **__: None)
    monkeypatch.setattr(pipeline, "check_options", lambda *_, **__: None)


def reached(call: Callable[[], object]) -> JobOptions:
    with pytest.raises(_Reached) as found:
        call()
    return found.value.options


def assert_settled(options: JobOptions, expected: Mapping[str, Any]) -> None:
    assert {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize(("asked", "expected"), SETTLED, ids=str)
def test_the_main_job_settles(asked: dict[str, Any], expected: dict[str, Any], tmp_path: Path, stopped: None) -> None:
    given = {"model": "m", **asked}
    assert_settled(reached(lambda: pipeline.run_job(given, tmp_path / "out", Ui(quiet=True))), expected)
    from nbl_export.cli import app

    for words in (
        [word for name, value in given.items() for word in (flag_of(name), str(value))],
        ["--config", str(as_toml(tmp_path, given))],
    ):
        line = [*words, "--output", str(tmp_path / "out")]
        assert_settled(reached(lambda line=line: app.app(line, standalone_mode=False)), expected)  # type: ignore[misc]


@pytest.fixture
def olive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`nbl_export.olive` with stand-ins for Olive's classes."""
    for name in ("olive", "olive.model", "olive.passes", "olive.passes.pass_config"):
        module: Any = types.ModuleType(name)
        module.HfModelHandler = module.ONNXModelHandler = module.Pass = module.PassConfigParam = object
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module("nbl_export.olive")
    sys.modules.pop("nbl_export.olive")


@pytest.mark.parametrize("asked", REPEATED, ids=str)
def test_the_recorded_command_settles_alike(asked: dict[str, Any], tmp_path: Path, stopped: None) -> None:
    from nbl_export.cli import app

    options = settle({"model": "m", **asked}, engine_defaults)
    words = shlex.split(describe_command(options, tmp_path / "out"))
    assert reached(lambda: app.app(words[1:], standalone_mode=False)) == options


def test_the_command_for_maps_without_a_bias_is_accepted(tmp_path: Path, stopped: None) -> None:
    from nbl_export.cli import app
    from nbl_export.run.deployed import Finished

    options = settle({"model": "m", "layers": "2", "select": "cca", "rank": "4"}, engine_defaults)
    found: Any = types.SimpleNamespace(_job=types.SimpleNamespace(options=options, plan=Plan(3, (0, 2))))
    remake: Any = Finished.remake
    words = shlex.split(remake.fget(found))
    assert_settled(
        reached(lambda: app.app(words[1:], standalone_mode=False)),
        {"layers": "0,2", "maps": "linear", "tap": "normed", "rank": "4", "select": None},
    )


@pytest.mark.parametrize(("asked", "expected"), SETTLED, ids=str)
def test_olive_settles(
    asked: dict[str, Any], expected: dict[str, Any], tmp_path: Path, stopped: None, olive: Any
) -> None:
    def job(**options: Any) -> None:
        model, config = types.SimpleNamespace(model_name_or_path="m"), types.SimpleNamespace(options=options)
        olive.Nbl._run_for_config(object.__new__(olive.Nbl), model, config, str(tmp_path / "out"))

    assert_settled(reached(lambda: job(**asked)), expected)
    with pytest.raises(UsageError, match=r"^--distill-steps is for --fit distilled"):
        job(fit="independent", distill_steps=40)
    with pytest.raises(UsageError, match="precison is no option"):
        job(precison="int4")


MANIFEST: dict[str, Any] = {
    "schema": 1, "status": "incomplete", "stages": {}, "command": "", "num_layers": 3,
    "replaced_layers": [1], "tap": "residual",
    "model": {"name": "m", "title": "m", "revision": None, "architecture": "llama", "fingerprint": "f"},
    "decoder": {"architecture": "llama", "num_layers": 3, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2,
                "head_dim": 16, "vocab_size": 512, "max_positions": 512},
    "calibration": {"tokens": 1024, "context": 64, "name": "t", "sha256": "s", "parts": [], "hub": {}},
    "places": {"model": "/nowhere/m", "calibration": []},
}  # fmt: skip


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[..., Path]:
    """options -> a run directory that records them, and holds nothing else."""

    def make(**asked: Any) -> Path:
        directory = tmp_path / "recorded"
        directory.mkdir(exist_ok=True)
        options = settle({"model": "m", **asked}, engine_defaults)
        RunDirectory(directory).save(**{**MANIFEST, "options": options.to_json()})
        return directory

    return make


def changed(directory: Path, **changes: Any) -> JobOptions:
    return reached(lambda: pipeline.run_stages(directory, "plan", Ui(quiet=True), changes=changes))


def test_a_changed_run_settles(recorded: Callable[..., Path], stopped: None) -> None:
    assert changed(recorded(), fit="distilled").tap == "normed"
    assert changed(recorded(), maps="linear").tap == "normed"
    assert changed(recorded(), fit="distilled", tap="residual").tap == "residual"
    assert changed(recorded(fit="distilled"), fit="independent").tap == "residual"
    assert changed(recorded(fit="distilled", tap="residual"), layers="2").tap == "residual"
    assert changed(recorded(tap="normed"), layers="2").tap == "normed"
    assert changed(recorded(layers="2"), kv_budget="1KiB").layers is None
    assert changed(recorded(engine="openvino", precision="int8"), layers="2").precision == "int8"


def test_a_calibration_settles(recorded: Callable[..., Path], stopped: None) -> None:
    directory = recorded(fit="distilled", tap="residual", distill_steps=4)

    def calibrated(**given: Any) -> JobOptions:
        return reached(lambda: pipeline.run_calibration("m", given, directory, Ui(quiet=True)))

    found = calibrated(calibration_tokens=64)
    assert (found.tap, found.fit, found.distill_steps) == ("residual", "distilled", 4)
    assert calibrated(tap="normed").tap == "normed"
    with pytest.raises(UsageError, match=r"^--seed is for --fit distilled or --calibration self"):
        pipeline.run_calibration("m", {"seed": 3}, directory / "new", Ui(quiet=True))


def test_a_changed_run_refuses_an_option_without_effect(recorded: Callable[..., Path], stopped: None) -> None:
    directory = recorded(layers="0,2")
    before = (directory / "nbl.json").read_bytes()
    for command, words in (("plan", ("--select", "cca")), ("build", ("--max-batch", 2)), ("bench", ("--batch", 2))):
        if command != "bench":
            assert_refused(nbl(command, directory, *words), 2, f"{words[0]} is for ")
    assert_refused(nbl("rewrite", directory, "--quantize", "awq"), 2, "--quantize is for --precision int4")
    assert (directory / "nbl.json").read_bytes() == before


def test_recorded_options_that_no_longer_apply_return_to_their_defaults(
    recorded: Callable[..., Path], stopped: None
) -> None:
    directory = recorded(fit="distilled", distill_steps=40, seed=3, layers="2", select="cca")
    found = changed(directory, fit="independent")
    assert (found.distill_steps, found.seed, found.select) == (None, 0, "cca")
    assert changed(directory, layers="0,2").select is None
    found = reached(
        lambda: pipeline.run_job(
            {"fit": "independent"}, directory / "new", Ui(quiet=True),
            recorded=JobOptions.from_json(json.loads((directory / "nbl.json").read_text())["options"]),
        )
    )  # fmt: skip
    assert (found.model, found.fit, found.distill_steps, found.tap) == ("m", "independent", None, "residual")


def test_a_command_without_options_keeps_the_recorded_ones(recorded: Callable[..., Path], stopped: None) -> None:
    """Else their stages would run again."""
    directory = recorded(layers="0,2", select="cca", seed=3)  # as no command records them
    assert changed(directory) == settle(
        {"model": "/nowhere/m", "layers": "0,2", "select": "cca", "seed": 3}, engine_defaults
    )
    run = RunDirectory.peek(directory)
    run.save(stages={"sweep": {"key": "k", "seconds": 0.0, "files": {}}})
    found = changed(directory, context=64)
    assert (found.select, found.seed) == ("cca", 0)


def test_none_asks_for_nothing(tmp_path: Path, stopped: None) -> None:
    asked = {"model": "m", "seed": None, "rank": None, "distill_steps": None}
    assert reached(lambda: pipeline.run_job(asked, tmp_path, Ui(quiet=True))) == settle({"model": "m"}, engine_defaults)


# -- engines ------------------------------------------------------------------------------------------------------


def test_engines_that_make_no_decoders(tmp_path: Path, recorded: Callable[..., Path]) -> None:
    done = nbl("--model", "m", "--engine", "llama.cpp", "--output", tmp_path / "out")
    assert_refused(done, 2, "llama.cpp makes no decoders", "ort, openvino, trt, trt-rtx", "convert DIR --to gguf")
    done = nbl("--model", "m", "--engine", "steam", "--output", tmp_path / "out")
    assert_refused(done, 2, "unknown engine 'steam'; engines are ort, openvino, trt, trt-rtx")
    assert "llama.cpp" not in done.err


def test_a_run_of_another_engine_is_not_built(recorded: Callable[..., Path]) -> None:
    done = nbl("build", recorded(), "--engine", "trt")
    assert_refused(done, 1, "is a run for --engine ort", "make another run with --engine trt or trt-rtx")


# -- layers and budgets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["abc", "7-3", "-1", "25%", ""])
@pytest.mark.parametrize("flag", ["--layers", "--draft-layers"])
def test_layers_are_read_before_the_model(flag: str, layers: str, tmp_path: Path, stopped: None) -> None:
    draft = ("--draft", "nbl") if flag == "--draft-layers" else ()
    done = nbl("--model", "nowhere", *draft, flag, layers, "--output", tmp_path / "out")
    assert_refused(done, 2, flag)


def test_layers_are_read_without_torch(tmp_path: Path) -> None:
    watch = "import atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))"
    done = in_new_process("--model", tmp_path, "--layers", "abc", "--output", tmp_path / "out", code=watch)
    assert (done.status, done.err.splitlines()[-1]) == (2, "False")
    assert "'abc' is not a layer" in done.err


@pytest.mark.parametrize(("budget", "count"), [(300, None), (299, 1), (200, 1), (199, 2), (100, 2), (99, None)])
def test_a_budget_replaces_a_layer_at_least(budget: int, count: int | None) -> None:
    from nbl_export.records.decoder import DecoderSpec

    spec = DecoderSpec("llama", 3, 10, 5, 5, 1, 10, 10)  # 10 bytes of each layer and token
    options, goal = JobOptions("m", kv_budget=f"{budget}B@10"), CacheBudget(budget, 10)
    if count is not None:
        assert layers_for_budget(options, goal, spec, 1) == (count, 100 * (3 - count))
        return
    said = "cannot be met" if budget < 100 else "already fits, so nothing needs to be replaced"
    with pytest.raises(NblError, match=said):
        layers_for_budget(options, goal, spec, 1)


def test_a_budget_that_is_met_already_starts_no_stage(recorded: Callable[..., Path], checkpoint: Any) -> None:
    directory = recorded()
    before = (directory / "nbl.json").read_bytes()
    refused = nbl("plan", directory, "--kv-budget", "64MiB")
    assert_refused(refused, 1, "--kv-budget 64MiB: the cache already fits", "nothing needs to be replaced")
    assert (directory / "nbl.json").read_bytes() == before
    out = directory.parent / "out"
    assert_refused(nbl("--model", checkpoint("llama"), "--kv-budget", "1GB@100", "--output", out), 1, "already fits")
    assert not out.exists()


def test_preflight_keeps_options_that_apply() -> None:
    options = settle({"model": "m", "layers": "2", "select": "cca"}, engine_defaults)
    assert preflight(options, ("layers", "select")) == options
