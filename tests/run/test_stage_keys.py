"""Every option that a stage reads is in its key, or in the key of a stage that it reads.

Only what takes a `Job` reads options: what declares the inputs of a stage. So the key has what the stage has, if
each `Lazy` input is identified by the options that its value follows from.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from nbl_export.options.options import JobOptions
from nbl_export.records.inputs import Lazy, identity_of
from nbl_export.records.requests import Subject
from nbl_export.run.job import Job
from nbl_export.run.pipeline import STAGES
from nbl_export.run.stages import common
from nbl_export.run.stages.common import Skipped

from ..jobs import TEXT, job_of

pytestmark = pytest.mark.engine

EVAL = (Subject("a", None, 10, {"sha256": "0"}, {"shots": 0}),)
TRT = {"engine": "trt-rtx", "decoder_source": "static", "precision": "fp16"}
# The options of a job in which the stage is not left out, and in which a changed plan hides no lack of a later key.
USUAL = {"layers": "1", "select": "cca"}
BASES: dict[str, dict[str, Any]] = {
    "plan": {"select": None},
    "distill": {"select": None, "fit": "distilled", "tap": "normed"},
    "verify": {"fit": "distilled", "tap": "normed"},
    "build": TRT,
}
EXIT: dict[str, Any] = {"layers": None, "select": None, "exit_layer": "auto"}
ASKED = {"eval": EVAL}
# Another value of each option.
OTHER: dict[str, Any] = {
    "destination": "mlx-lm", "layers": "2", "exit_layer": "1", "max_perplexity_increase": "5%",
    "fit": "drop", "select": "efficient", "tap": "normed", "maps": "linear",
    "distill_minutes": 1.0,
    "distill_steps": 7, "distill_tokens": 7, "lora_rank": 7, "label_weight": 0.7, "calibration_tokens": 1024,
    "context": 64, "compute_dtype": "float32", "seed": 7, "precision": "fp32",
    "provider": "cuda", "max_seq_len": 128, "max_batch": 2, "prefill_chunk": 64, "logits": "all",
    "decoder_source": "mobius", "builder_option": ("block_size=64",), "quantized_model": "q",
    "depths": (7,), "repetitions": 7, "prompt_tokens": (7,),
    "generate_tokens": 7, "threads": 1, "engine": "openvino",
}  # fmt: skip
_PLAN = ("layers", "exit_layer", "max_perplexity_increase", "fit", "select",
         "tap", "maps", "compute_dtype", "logits", "destination")  # fmt: skip
_DECODER = ("precision", "provider", "logits", "decoder_source", "builder_option", "quantized_model")
_GRAPHS = tuple(dict.fromkeys((*_PLAN, *_DECODER)))
_BENCH = ("depths", "repetitions", "prompt_tokens", "generate_tokens", "threads")
# What each stage reads.
READS: dict[str, tuple[str, ...]] = {
    "text": ("calibration_tokens", "context", "distill_tokens"),
    "calibrate": ("exit_layer", "tap", "compute_dtype"),
    "plan": _PLAN,
    "distill": (*_PLAN, "distill_minutes", "distill_steps", "lora_rank", "label_weight", "seed"),
    "decoder": _DECODER,
    "rewrite": _GRAPHS,
    "verify": ("context", *_GRAPHS),
    "eval": _GRAPHS,
    "build": ("engine", "max_batch", "prefill_chunk", "max_seq_len", *(name for name in _GRAPHS if name != "provider")),
    "bench": (*_BENCH, *_GRAPHS),
    "report": (*_BENCH, *_GRAPHS),
}  # fmt: skip
# Another value of an option that already has the value above in the stage's base.
HERE: dict[tuple[str, str], Any] = {
    ("build", "engine"): "trt", ("build", "decoder_source"): "genai", ("distill", "fit"): "independent",
    ("distill", "tap"): "residual", ("verify", "fit"): "independent", ("verify", "tap"): "residual",
    ("plan", "select"): "cca", ("distill", "select"): "cca",
}  # fmt: skip


def keys(job: Job) -> dict[str, str]:
    """The keys of the stages that are not left out."""
    found = {stage.name: stage.declared(job) for stage in STAGES}
    return {name: declared[1] for name, declared in found.items() if not isinstance(declared, Skipped)}


@pytest.fixture
def key_of_stage(tmp_path: Path) -> Any:
    """(stage, options, manifest) -> its key."""

    def make(stage: str, manifest: dict[str, Any] | None = None, asked: Any = None, **changes: Any) -> str | None:
        options = {**USUAL, **BASES.get(stage, {}), **changes}
        return keys(job_of(tmp_path, options, manifest, asked or ASKED.get(stage, ()))).get(stage)

    return make


@pytest.mark.parametrize("stage", READS)
def test_an_option_that_a_stage_reads_is_in_its_key(stage: str, key_of_stage: Any) -> None:
    before = key_of_stage(stage)
    assert before is not None and before == key_of_stage(stage)
    changed = {option: HERE.get((stage, option), OTHER[option]) for option in READS[stage]}
    assert [option for option, value in changed.items() if key_of_stage(stage, **{option: value}) == before] == []


def test_the_recent_tokens_of_an_exit_layer_are_in_the_key_of_the_plan_alone(key_of_stage: Any) -> None:
    named = {"layers": None, "select": None, "exit_layer": "1"}
    assert len({key_of_stage("plan", **named, recent_tokens=count) for count in (64, 65)}) == 2
    assert len({key_of_stage("calibrate", **named, recent_tokens=count) for count in (64, 65)}) == 1
    assert key_of_stage("plan", recent_tokens=65) == key_of_stage("plan")
    assert len({key_of_stage("plan", **EXIT, max_perplexity_increase=share) for share in (None, "6%", "7%")}) == 3
    assert len({key_of_stage("calibrate", **EXIT, compute_dtype=name) for name in ("auto", "float32")}) == 2


@pytest.mark.parametrize(
    ("stage", "given", "same"),
    [
        ("decoder", {}, {"tap": "normed"}), ("decoder", {}, {"max_seq_len": 128}), ("build", {}, {"max_batch": 1}),
        ("build", {}, {"prefill_chunk": 512}), ("plan", {}, {"precision": "int8"}), ("verify", {}, {"threads": 2}),
        ("verify", {}, {"device": "cpu"}),
    ],
)  # fmt: skip
def test_what_changes_nothing_in_a_stage_is_not_in_its_key(
    stage: str, given: dict[str, Any], same: dict[str, Any], key_of_stage: Any
) -> None:
    """Another name of the default, and what only another stage reads."""
    assert key_of_stage(stage, **{**given, **same}) == key_of_stage(stage, **given)


# The earlier stages whose keys are in that of each stage. No key has that of `text`: parts of the text are inputs.
EDGES: dict[str, set[str]] = {
    "text": set(), "calibrate": set(), "plan": {"calibrate"}, "distill": {"plan"}, "decoder": set(),
    "rewrite": {"plan", "distill", "decoder"}, "verify": {"rewrite"}, "eval": {"rewrite"}, "build": {"rewrite"},
    "bench": {"rewrite", "build"}, "report": {"plan", "verify", "eval", "build", "bench"},
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_another_result_of_a_stage_that_is_read_is_another_key(stage: common.Stage[Any], tmp_path: Path) -> None:
    def key(**others: str) -> str:
        job = job_of(tmp_path, {**USUAL, **BASES.get(stage.name, {})}, asked=ASKED.get(stage.name, ()))
        job.keys.update({**dict.fromkeys(EDGES, "one"), **others})
        declared = stage.declared(job)
        assert not isinstance(declared, Skipped)
        return declared[1]

    changed = {name for name in EDGES if name != "text" and key(**{name: "another"}) != key()}
    assert changed == EDGES[stage.name]
    job = job_of(tmp_path, USUAL)
    keys(job)
    assert "text" not in job.keys


# The parts of the text that each stage reads itself.
ROWS: dict[str, tuple[str, ...]] = {
    "calibrate": ("windows",),
    "plan": (
        "validation",
        "selection",
        "second.validation",
        "second.selection",
        "retrieval.validation.pairs",
        "retrieval.selection.pairs",
    ),
    "distill": ("training", "selection"),
    "verify": tuple(part for part in TEXT["parts"] if not part.startswith("retrieval.")),
}


@pytest.mark.parametrize(
    ("stage", "options"), [*((s, BASES.get(s, {})) for s in ROWS), ("calibrate", EXIT), ("plan", EXIT)]
)
def test_other_rows_of_a_part_that_a_stage_reads_are_another_key(
    stage: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """The hash of a part stands for its rows; no stage before need be another."""

    def identity(**parts: str) -> Any:
        text = {**TEXT, "parts": {**TEXT["parts"], **parts}}
        inputs = next(s for s in STAGES if s.name == stage).declare(
            job_of(tmp_path, {**USUAL, **options}, {"text": text})
        )
        return identity_of(inputs)

    changed = {part for part in TEXT["parts"] if identity(**{part: "other"}) != identity()}
    assert changed == set(ROWS[stage])


def test_inputs_that_are_no_options_are_in_the_keys(key_of_stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, text, quantised checkpoint, request, and the compiler's version."""
    parts = dict.fromkeys(TEXT["parts"], "other")
    for stage in READS:
        assert key_of_stage(stage, {"model": {"fingerprint": "other"}}) != key_of_stage(stage)
        text = key_of_stage(stage, {"text": {**TEXT, "parts": parts}})
        assert (text == key_of_stage(stage)) == (stage == "text"), stage  # int8 rounds by moments of the text
    codes = {"quantized_model": "q"}
    assert key_of_stage("decoder", {"quantized": {"fingerprint": "x"}}, **codes) != key_of_stage("decoder", **codes)
    others: list[dict[str, Any]] = [{"name": "b"}, {"limit": 20}, {"data": {"sha256": "1"}}, {"config": {"shots": 1}}]
    asked = [(dataclasses.replace(EVAL[0], **other),) for other in others]
    assert len({key_of_stage("eval", asked=other) for other in (EVAL, *asked)}) == len(asked) + 1
    version = "nbl_export.targets.tensorrt.engine.TensorRtEngine.library_version"
    built = []
    for number in "12":
        monkeypatch.setattr(version, lambda _self, number=number: number)
        built.append(key_of_stage("build"))
    assert built[0] != built[1]


# -- what stages read ------------------------------------------------------------------------------------------

# Options that follow from others or from the model: the form of the graph, the hash of the text.
# The device changes no result.
FOLLOW = {"device", "decoder_source", "engine", "calibration", "model"}
# The curve states what its speeds were modelled for.
STATED = {"text": {"seed"}, "plan": {"precision", "provider", "prompt_tokens"}}


class Watched(JobOptions):
    """Options that note the name of each option that is read."""

    seen: ClassVar[set[str]] = set()

    def __post_init__(self) -> None:
        """Checked before."""

    def __getattribute__(self, name: str) -> Any:
        if name in JobOptions.__dataclass_fields__:
            Watched.seen.add(name)
        return super().__getattribute__(name)


@dataclasses.dataclass(frozen=True)
class Costs:
    """Stands in for a cost model."""

    speedup: Any = None
    tail_pruned: bool = False
    all_logits: bool = True


def costs_of(options: JobOptions, *_args: Any, **_given: Any) -> Costs:
    """Reads what a cost model reads of the options."""
    _ = options.engine, options.provider, options.precision, options.prompt_length, options.kept_logits
    return Costs()


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What loads a model, a text or a file is replaced, so that only the options that say what is loaded are left."""
    import torch

    model: Any = SimpleNamespace(device=torch.device("cpu"), to=lambda _device: model)
    stubs: dict[str, Any] = {
        "nbl_export.run.job.require_engine": lambda *_args, **_given: None,
        "nbl_export.run.job.cost_model": costs_of,
        "nbl_export.run.job.read_shape": lambda _: SimpleNamespace(mlp=None),
        "nbl_export.methods.checkpoint.load.materialise": lambda *_: Path(),
        "nbl_export.methods.checkpoint.load.load_model": lambda _directory: model,
        "nbl_export.methods.checkpoint.load.load_tokenizer": lambda _directory: None,
        "nbl_export.methods.checkpoint.quantized.find": lambda *_: SimpleNamespace(directory=""),
        "nbl_export.methods.checkpoint.quantized.check_same": lambda *_: None,
        "nbl_export.model.mapped.mapped_model": lambda *_: model,
        "nbl_export.model.mapped.shortage_of": lambda _directory: "",
        "nbl_export.model.mapped.weight_files": lambda _directory: [],
        "nbl_export.text.mixture.read_texts": lambda *_: SimpleNamespace(name="t", sha256="text"),
        "nbl_export.text.parts.read": lambda *_: torch.zeros(8, 8, dtype=torch.long),
    }
    for name, value in stubs.items():
        monkeypatch.setattr(name, value)


def loaded(value: Any) -> None:
    """Load every lazy part of inputs."""
    if isinstance(value, Lazy):
        value.value  # noqa: B018
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            loaded(getattr(value, field.name))


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("stage", sorted(READS.keys() - {"build", "eval", "report"}))
def test_the_table_above_has_what_a_stage_reads(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs of a stage are declared and loaded, all of them, while each read option is noted."""
    options = {**USUAL, **BASES.get(stage, {})}
    job = job_of(tmp_path, options, asked=ASKED.get(stage, ()))
    watched = Watched(**{name: getattr(job.options, name) for name in JobOptions.__dataclass_fields__})
    job.options = watched
    monkeypatch.setattr(common.StageContext, "maps", lambda _self: {})
    monkeypatch.setattr("nbl_export.methods.sums_file.open_sums", lambda _path: None)
    found = next(s for s in STAGES if s.name == stage)
    Watched.seen.clear()
    inputs = found.declare(job)
    assert not isinstance(inputs, Skipped)
    loaded(inputs)
    assert Watched.seen or stage == "rewrite"
    # Conditions that are read to leave a stage out do not change what it makes.
    shared = CANDIDATES if stage == "calibrate" else set()
    assert Watched.seen - FOLLOW - STATED.get(stage, set()) - GATES - shared <= set(READS[stage])


# Options that decide whether a stage runs, and nothing else in it.
GATES = {"fit"}
# Options of which candidates are made; only those of `READS` change which sums are needed.
CANDIDATES = {"layers", "select", "maps", "destination", "fit", "recent_tokens"}
