"""The estimate against measured jobs; what it makes of options and of memory."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from nbl_export.measure import estimate as estimating
from nbl_export.measure.cost import CostModel
from nbl_export.measure.estimate import Job, Needs, measure_products
from nbl_export.methods.checkpoint.shape import Shape
from nbl_export.methods.predicted_kv.sums import ExitShape
from nbl_export.options.options import JobOptions
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.mlp import MlpSpec
from nbl_export.targets import load_engine
from nbl_export.text import windows
from nbl_export.text.windows import CALIBRATION_ROLES, SECOND_ROLES

RESULTS = Path(__file__).parents[2] / "bench" / "results"
SMOLLM2 = Shape(DecoderSpec("llama", 30, 576, 9, 3, 64, 49152, 8192), MlpSpec(1536), tied=True, is_gguf=True)
QWEN = Shape(DecoderSpec("qwen2", 24, 896, 14, 2, 64, 151936, 32768), MlpSpec(4864), tied=True, is_gguf=True)
QWEN_3B = Shape(DecoderSpec("qwen2", 36, 2048, 16, 2, 128, 151936, 32768), MlpSpec(11008), tied=True)
LLAMA_8B = Shape(DecoderSpec("llama", 32, 4096, 32, 8, 128, 128256, 131072), MlpSpec(14336), tied=False)
GIB = 1 << 30
WITHIN = 2.0


@pytest.fixture(autouse=True)
def whole_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a user's job."""
    monkeypatch.setattr(windows, "PART_TOKENS", {CALIBRATION_ROLES: 4096, SECOND_ROLES: 8192})


def job(shape: Shape, rate: float = 2e11, memory: int = 23 * GIB, *, tiles: bool = False, **options: Any) -> Job:
    options = {"fit": "independent", **options}
    engine = load_engine(options.get("engine", "ort")).capabilities
    return Job(shape, JobOptions("m", **options), engine, rate, tiles, memory)


def by_stage(estimated: Job) -> dict[str, Needs]:
    return {stage.stage: stage for stage in estimated.needs()}


def off(estimated: float, measured: float) -> float:
    """The factor between two numbers, at least 1."""
    return max(estimated / measured, measured / estimated)


# Seconds of jobs with default options that ran alone, on two cores of an AMD EPYC with float32 products at this rate.
RATE = 2.0e11
DEFAULT = {
    "smollm2": (SMOLLM2, {"calibrate": 122.1, "plan": 238.9, "verify": 159.1, "bench": 131.3}),
    "qwen": (QWEN, {"calibrate": 227.4, "plan": 784.2, "verify": 528.0, "bench": 304.7}),
}


@pytest.mark.parametrize("name", DEFAULT)
def test_default_jobs_agree_with_what_was_measured(name: str) -> None:
    shape, measured = DEFAULT[name]
    stages = by_stage(job(shape, RATE, exit_layer="auto", prompt_tokens=(512, 2048), depths=(0,)))
    assert max(off(stages[stage].seconds, seconds) for stage, seconds in measured.items()) < 1.4
    found, taken = (sum(each) for each in ((stages[stage].seconds for stage in measured), measured.values()))
    assert off(found, taken) < 1.3


@pytest.mark.parametrize(("name", "shape"), [("stages-smollm2", SMOLLM2), ("stages-qwen", QWEN)])
def test_whole_jobs_agree_with_what_was_measured(name: str, shape: Shape) -> None:
    """Of jobs in float32. Without `plan`: the validation texts were half as long then."""
    measured = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    plain = CostModel(shape.decoder, shape.mlp, 4, 4, 4, tail_pruned=False).prefill({}, 512).flops / 512
    stages = by_stage(
        job(
            shape, measured["tokens"] * plain / measured["plain_seconds"],
            tiles=True, select="efficient", precision="fp32",
        )
    )  # fmt: skip
    assert list(stages) == ["calibrate", "plan", "decoder", "rewrite", "verify", "bench"]
    assert stages.pop("rewrite").seconds < 10  # it took a second or two
    seconds = {name: off(stages[name].seconds, measured["seconds"][name]) for name in stages if name != "plan"}
    assert max(seconds.values()) < WITHIN, seconds
    assert off(sum(needs.seconds for needs in stages.values()), measured["total_seconds"]) < WITHIN
    for stage, needs in stages.items():
        assert needs.memory_bytes < measured["stage_peak_bytes"]["decoder graph" if stage == "decoder" else stage]


@pytest.mark.parametrize(("size", "shape"), [("3B", QWEN_3B), ("8B", LLAMA_8B)])
def test_layer_by_layer_agrees_with_what_was_measured(size: str, shape: Shape) -> None:
    measured = json.loads((RESULTS / f"shapes-{size.lower()}.json").read_text(encoding="utf-8"))["shapes"][size]
    streamed = job(
        shape, measured["speed"]["product_flops_per_second"], measured["speed"]["memory_bytes"],
        calibration_tokens=measured["tokens"], layers=str(measured["layers"] // 4), depths=(0,), repetitions=2,
        select="cca", precision=measured["precision"],
    )  # fmt: skip
    assert not streamed.fits
    assert off(shape.parameters, measured["parameters"]) < 1.001
    stages = {stage: by_stage(streamed)[stage] for stage in ("calibrate", "plan", "decoder")}
    seconds = {stage: off(needs.seconds, measured[stage]["seconds"]) for stage, needs in stages.items()}
    assert max(seconds.values()) < WITHIN, seconds
    needed = {stage: needs.memory_bytes / measured[stage]["peak_bytes"] for stage, needs in stages.items()}
    assert max(needed.values()) < 1, needed


# -- options --------------------------------------------------------------------------------------------------


def test_an_exit_layer_is_offered_where_a_job_takes_one() -> None:
    taken: dict[str, Any] = {"exit_layer": "none", "layers": "8"}
    assert job(SMOLLM2, **taken)._with_exit() is not None
    for source, precision in (("mobius", "fp32"), ("mobius", "fp16")):
        offered = job(SMOLLM2, **taken, decoder_source=source, precision=precision)._with_exit()
        assert (offered is None) == (precision == "fp16")
    experts = dataclasses.replace(SMOLLM2, decoder=dataclasses.replace(SMOLLM2.decoder, architecture="olmoe"))
    assert job(experts, **taken, engine="openvino", decoder_source="openvino")._with_exit() is None


def test_a_stage_that_does_not_run_is_left_out() -> None:
    assert "distill" in by_stage(job(SMOLLM2, fit="distilled"))
    assert "distill" not in by_stage(job(LLAMA_8B, fit="distilled"))  # it does not fit into memory
    assert "bench" not in by_stage(job(SMOLLM2, engine="trt", precision="fp16", decoder_source="static"))
    nbl = dataclasses.replace(SMOLLM2, is_gguf=False, maps_tap="residual")
    given = by_stage(job(nbl, fit="given", precision="fp32"))
    assert list(given) == ["decoder", "rewrite", "verify", "bench"]
    assert given["decoder"].disk_bytes == pytest.approx(2 * 4 * SMOLLM2.parameters)  # the stock checkpoint too


def test_time_follows_the_options() -> None:
    def seconds(stage: str, **options: Any) -> float:
        return by_stage(job(SMOLLM2, **options))[stage].seconds

    short = seconds("calibrate", calibration_tokens=65536)
    assert seconds("calibrate", calibration_tokens=131072) == pytest.approx(2 * short)
    assert seconds("calibrate", tap="normed") > short  # two taps
    assert by_stage(job(SMOLLM2, tiles=True))["calibrate"].seconds < short
    assert by_stage(job(SMOLLM2, rate=1e11))["verify"].seconds > seconds("verify")
    named, counted, decided = (seconds("plan", **asked) for asked in ({"layers": "1,2"}, {"layers": "8"}, {}))
    assert named < counted < decided
    assert seconds("plan", fit="distilled") < decided  # the limit is tested after the training
    assert seconds("distill", fit="distilled", layers="8", distill_minutes=3) == 180
    limited = seconds("distill", fit="distilled", distill_minutes=3)  # the tests of the limit come after it
    assert 180 < limited < seconds("distill", fit="distilled")
    assert seconds("bench", repetitions=12) == pytest.approx(2 * seconds("bench", repetitions=6))


def test_quantised_graphs_are_smaller() -> None:
    plain, coded = (by_stage(job(LLAMA_8B, memory=200 * GIB, precision=name)) for name in ("fp32", "int4"))
    assert coded["rewrite"].disk_bytes < plain["rewrite"].disk_bytes / 4
    assert coded["bench"].memory_bytes < plain["bench"].memory_bytes


def test_a_model_needs_memory_for_one_layer_at_a_time() -> None:
    stages = by_stage(job(LLAMA_8B, memory=9 * GIB, precision="int4"))
    assert max(needs.memory_bytes for stage, needs in stages.items() if stage != "decoder") < 8 * GIB
    assert by_stage(job(SMOLLM2, fit="distilled"))["distill"].memory_bytes == 4 * SMOLLM2.parameters


@pytest.mark.parametrize("exit_layer", ["20", "auto"])
def test_sums_of_exit_layers_are_in_memory_beside_the_model(exit_layer: str) -> None:
    estimated = job(SMOLLM2, exit_layer=exit_layer)
    needs = by_stage(estimated)["calibrate"]
    shape = ExitShape(estimated.exits, 30, 576, 3 * 64, 1e-5)
    sums = sum(8 * math.prod(size) for size in shape.tensors().values())
    for held in (needs.memory_bytes, needs.disk_bytes):  # the disk also holds a checkpoint made of the GGUF file
        assert held - 4 * SMOLLM2.parameters == pytest.approx(sums, rel=0.1)


def test_an_export_out_of_mapped_files_needs_no_memory_for_them() -> None:
    def needed(**asked: Any) -> float:
        return by_stage(job(LLAMA_8B, **asked))["decoder"].memory_bytes

    weights = 4 * LLAMA_8B.parameters
    assert needed(precision="int4") < 0.6 * weights
    assert needed(engine="openvino", decoder_source="openvino", precision="int8") < 0.6 * weights
    assert needed(engine="openvino", decoder_source="openvino", precision="fp16") > weights
    assert needed(precision="fp16", decoder_source="mobius") > weights


def test_a_gain_is_that_of_the_named_layers_or_of_the_middle() -> None:
    def speedup(**asked: Any) -> float:
        return job(SMOLLM2, **asked).gains()[0].speedup

    gain = speedup(layers="10")
    assert 1 < gain == speedup(layers="10-19") < speedup(layers="20-29")
    assert gain < speedup(layers="10", fit="drop")
    assert speedup() == speedup(layers="8")  # a quarter


def test_speed_of_this_machine() -> None:
    speed = measure_products(2)
    assert speed.flops_per_second > 1e8 and 0 < speed.share <= 1
    assert measure_products(2) is speed  # measured once


def test_other_programs_change_the_share_and_not_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks of a machine that gives each thread a third of its time."""
    passed = threading.local()

    def clock() -> float:
        passed.seconds = getattr(passed, "seconds", 0.0) + 1e-3
        return float(passed.seconds)

    monkeypatch.setattr(estimating.time, "perf_counter", clock)
    monkeypatch.setattr(estimating.time, "thread_time", lambda: getattr(passed, "seconds", 0.0) / 3)
    busy = measure_products.__wrapped__(2)
    assert busy.share == pytest.approx(1 / 3, rel=0.02)
    monkeypatch.setattr(estimating.time, "thread_time", lambda: getattr(passed, "seconds", 0.0))
    assert busy.flops_per_second == pytest.approx(3 * measure_products.__wrapped__(2).flops_per_second, rel=0.02)
