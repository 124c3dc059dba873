"""Every option that a stage reads is in its key, or in the key of a stage that it reads."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from nbl_export.options.options import JobOptions
from nbl_export.records.requests import (
    EvalRequest,
    Prepared,
    Subject,
    SweepRequest,
)
from nbl_export.run import pipeline
from nbl_export.run.job import Job
from nbl_export.run.stages import STAGES

from ..command import nbl
from ..jobs import job_of

EVAL = Prepared(EvalRequest(tasks=("a",)), (Subject("a", None, 10, {"sha256": "0"}, {"shots": 0}),), "harness 1")
TRT = {"engine": "trt-rtx", "decoder_source": "static", "precision": "fp16"}
# The options of a job in which the stage is not left out, and in which a changed plan hides no lack of a later key.
USUAL = {"layers": "1", "select": "cca"}
BASES: dict[str, dict[str, Any]] = {
    "plan": {"select": None},
    "sweep": {"select": None},
    "distill": {"select": None, "fit": "distilled", "tap": "normed"},
    "verify": {"fit": "distilled", "tap": "normed"},
    "quantize": {"precision": "int4", "quantize": "awq"},
    "build": TRT,
    "lossless": {"draft": "nbl"},
}
ASKED = {"sweep": SweepRequest(1), "eval": EVAL}
# Another value of each option.
OTHER: dict[str, Any] = {
    "layers": "2", "max_perplexity_increase": "5%", "target_speedup": "1.1", "kv_budget": "1KiB", "fit": "drop",
    "select": "error", "rank": "3", "tap": "normed", "maps": "linear", "token_table": False, "distill_minutes": 1.0,
    "distill_steps": 7, "distill_tokens": 7, "lora_rank": 7, "label_weight": 0.7, "calibration_tokens": 1024,
    "context": 64, "compute_dtype": "float32", "seed": 7, "precision": "int8", "requantize": True,
    "provider": "cuda", "max_seq_len": 128, "max_batch": 2, "prefill_chunk": 64, "logits": "all",
    "decoder_source": "mobius", "builder_option": ("block_size=64",), "quantize": "awq", "quantized_model": "q",
    "draft": "int4", "draft_layers": "1", "depths": (7,), "repetitions": 7, "prompt_tokens": (7,),
    "generate_tokens": 7, "threads": (1,), "batches": (2,), "engine": "openvino",
}  # fmt: skip
_PLAN = ("layers", "max_perplexity_increase", "target_speedup", "kv_budget", "fit", "select", "rank", "tap", "maps",
         "token_table", "calibration_tokens", "context", "compute_dtype", "logits")  # fmt: skip
_DECODER = ("precision", "provider", "max_seq_len", "logits", "decoder_source", "builder_option", "quantize",
            "quantized_model")  # fmt: skip
_GRAPHS = tuple(dict.fromkeys((*_PLAN, *_DECODER)))
_BENCH = ("depths", "repetitions", "prompt_tokens", "generate_tokens", "threads", "batches")
# What each stage reads.
READS: dict[str, tuple[str, ...]] = {
    "calibrate": ("calibration_tokens", "context", "tap", "compute_dtype"),
    "plan": _PLAN,
    "sweep": ("layers", "select", "rank", "tap", "maps", "token_table", "calibration_tokens", "context",
              "compute_dtype", "precision", "provider", "engine", "logits", "prompt_tokens"),
    "distill": (*_PLAN, "distill_minutes", "distill_steps", "distill_tokens", "lora_rank", "label_weight", "seed"),
    "quantize": ("quantize", "calibration_tokens", "context", "builder_option"),
    "decoder": _DECODER,
    "rewrite": _GRAPHS,
    "verify": ("distill_tokens", *_GRAPHS),
    "eval": _GRAPHS,
    "build": ("engine", "max_batch", "prefill_chunk", *(name for name in _GRAPHS if name != "provider")),
    "bench": (*_BENCH, *_GRAPHS),
    "lossless": ("draft", "draft_layers", "threads", "requantize", *_GRAPHS),
    "report": (*_BENCH, *_GRAPHS),
}  # fmt: skip
# Another value of an option that already has the value above in the stage's base.
HERE: dict[tuple[str, str], Any] = {
    ("build", "engine"): "trt", ("build", "decoder_source"): "genai", ("distill", "fit"): "independent",
    ("distill", "tap"): "residual", ("verify", "fit"): "independent", ("verify", "tap"): "residual",
    ("sweep", "layers"): None, ("quantize", "quantize"): None,
}  # fmt: skip


def keys(job: Job) -> dict[str, str]:
    """The keys of the stages that are not left out."""
    found: dict[str, str] = {}
    for stage in STAGES:
        if stage.skip(job) is None:
            found[stage.name] = pipeline._key(job, stage, found)
    return found


@pytest.fixture
def key_of_stage(tmp_path: Path) -> Any:
    """(stage, options, manifest) -> its key."""

    def make(stage: str, manifest: dict[str, Any] | None = None, asked: Any = None, **changes: Any) -> str | None:
        options = {**USUAL, **BASES.get(stage, {}), **changes}
        return keys(job_of(tmp_path, options, manifest, asked or ASKED.get(stage))).get(stage)

    return make


@pytest.mark.parametrize("stage", READS)
def test_an_option_that_a_stage_reads_is_in_its_key(stage: str, key_of_stage: Any) -> None:
    before = key_of_stage(stage)
    assert before is not None and before == key_of_stage(stage)
    changed = {option: HERE.get((stage, option), OTHER[option]) for option in READS[stage]}
    assert [option for option, value in changed.items() if key_of_stage(stage, **{option: value}) == before] == []


@pytest.mark.parametrize("goal", [{"target_speedup": "1.1"}, {"kv_budget": "1KiB"}], ids=str)
def test_what_a_goal_counts_is_in_the_key_of_the_plan(goal: dict[str, str], key_of_stage: Any) -> None:
    given: dict[str, Any] = {"layers": None, **goal}
    for option in ("engine", "provider", "precision", "prompt_tokens", "logits", "token_table"):
        assert key_of_stage("plan", **given, **{option: OTHER[option]}) != key_of_stage("plan", **given), option


@pytest.mark.parametrize("option", ["calibration_tokens", "context"])
def test_maps_that_are_given_are_verified_again_on_other_text(option: str, key_of_stage: Any) -> None:
    """No stage before reads the text then."""
    given = {"fit": "given", "tap": "residual"}
    assert key_of_stage("verify", **given, **{option: OTHER[option]}) != key_of_stage("verify", **given)
    assert key_of_stage("verify", {"calibration": {"sha256": "other"}}, **given) != key_of_stage("verify", **given)


def test_inputs_that_are_no_options_are_in_the_keys(key_of_stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, text, quantised checkpoint, moments of a distilled sweep, request, and the compiler's version."""
    for stage in READS:
        assert key_of_stage(stage, {"model": {"fingerprint": "other"}}) != key_of_stage(stage)
        text = key_of_stage(stage, {"calibration": {"sha256": "other"}})
        assert (text == key_of_stage(stage)) == (stage == "decoder"), stage
    codes = {"quantized_model": "q"}
    assert key_of_stage("decoder", {"quantized": {"fingerprint": "x"}}, **codes) != key_of_stage("decoder", **codes)
    assert key_of_stage("sweep", {"stages": {"distill": {"key": "x"}}}) != key_of_stage("sweep")
    assert key_of_stage("sweep", asked=SweepRequest(2)) != key_of_stage("sweep")
    (subject,) = EVAL.subjects
    others: list[dict[str, Any]] = [{"name": "b"}, {"limit": 20}, {"data": {"sha256": "1"}}, {"config": {"shots": 1}}]
    asked = [dataclasses.replace(EVAL, subjects=(dataclasses.replace(subject, **other),)) for other in others]
    request = dataclasses.replace(EVAL.request, variants=("nbl",))
    asked += [dataclasses.replace(EVAL, harness="harness 2"), dataclasses.replace(EVAL, request=request)]
    assert len({key_of_stage("eval", asked=other) for other in (EVAL, *asked)}) == len(asked) + 1
    version = "nbl_export.targets.tensorrt.engine.TensorRtEngine.library_version"
    built = []
    for number in "12":
        monkeypatch.setattr(version, lambda _self, number=number: number)
        built.append(key_of_stage("build"))
    assert built[0] != built[1]


# -- what stages read while they run ---------------------------------------------------------------------------

APART = {"build", "eval", "report"}  # the first needs a GPU, the second a harness, the last reads the manifest alone
# Options that follow from others or from the model: whether it is a graph, the form of the graph, the text's hash.
FOLLOW = {"decoder_source", "engine", "calibration", "model"}
# The curve states what its speeds were modelled for. The key of a sweep has the key of the stage that distils.
STATED = {("plan", "precision"), ("plan", "provider"), ("plan", "prompt_tokens"), ("sweep", "fit")}


class Watched(JobOptions):
    """Options that note the stage and the name of each option that is read."""

    stage: ClassVar[str] = ""
    seen: ClassVar[defaultdict[str, set[str]]] = defaultdict(set)

    def __post_init__(self) -> None:
        """Checked before."""

    def __getattribute__(self, name: str) -> Any:
        reader = sys._getframe(1).f_globals["__name__"]
        if name in JobOptions.__dataclass_fields__ and reader != "dataclasses" and Watched.stage:
            Watched.seen[Watched.stage].add(name)
        return super().__getattribute__(name)


@pytest.fixture(scope="module")
def read(same: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, set[str]]]:
    """The options that the stages of a job and of a sweep read, by stage."""
    run = pipeline.Stage.run
    cached = {name for name, value in vars(Job).items() if isinstance(value, functools.cached_property)}

    def watched(stage: pipeline.Stage, job: Job, out: Path) -> dict[str, Any]:
        given = job.options
        job.options = Watched(**{name: getattr(given, name) for name in JobOptions.__dataclass_fields__})
        for name in cached:  # what an earlier stage read for this one
            job.__dict__.pop(name, None)
        Watched.stage = stage.name
        try:
            return run(stage, job, out)
        finally:
            Watched.stage, job.options = "", given

    output = tmp_path_factory.mktemp("read") / "run"
    options = ("--fit", "distilled", "--distill-steps", 2, "--precision", "int4", "--quantize", "awq", "--draft", "nbl",
               "--draft-layers", 1)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.Stage, "run", watched)
        for command in ((*same, *options, "--output", output), ("plan", output, "--sweep", "--max-layers", 1)):
            done = nbl(*command)
            assert done.status == 0, done.err
        yield dict(Watched.seen)


@pytest.mark.parametrize("stage", sorted(READS.keys() - APART))
def test_the_table_above_has_what_a_stage_reads(stage: str, read: dict[str, set[str]]) -> None:
    stated = {option for of, option in STATED if of == stage}
    assert read[stage] - FOLLOW - stated <= set(READS[stage])
