"""The estimate against measured jobs; what it makes of options and of memory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from nbl_export.measure.cost import LayerSizes
from nbl_export.measure.estimate import STAGES, Job, Needs
from nbl_export.measure.machine_speed import Speed, measure_speed
from nbl_export.mixers.base import TokenWork
from nbl_export.mixers.rows import Read
from nbl_export.model.checkpoint.shape import Shape
from nbl_export.options.options import JobOptions
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.mlp import MlpSpec
from nbl_export.targets import load_engine
from nbl_export.text import windows

RESULTS = Path(__file__).parents[2] / "bench" / "results"
SMOLLM2 = Shape(DecoderSpec("llama", 30, 576, 9, 3, 64, 49152, 8192), MlpSpec(1536), tied=True, is_gguf=True)
QWEN = Shape(DecoderSpec("qwen2", 24, 896, 14, 2, 64, 151936, 32768), MlpSpec(4864), tied=True, is_gguf=True)
QWEN_3B = Shape(DecoderSpec("qwen2", 36, 2048, 16, 2, 128, 151936, 32768), MlpSpec(11008), tied=True)
LLAMA_8B = Shape(DecoderSpec("llama", 32, 4096, 32, 8, 128, 128256, 131072), MlpSpec(14336), tied=False)
GIB = 1 << 30
COPIED = 14e9  # bytes a second on the machine of the results
WITHIN = 1.5
FURTHER = {("3B", "plan"): 1.6}  # other jobs ran beside


def job(shape: Shape, rate: float = 2e11, memory: int = 23 * GIB, *, narrow: bool = True, **options: Any) -> Job:
    options = {"fit": "independent", **options}
    engine = load_engine(options.get("engine", "ort")).capabilities
    return Job(shape, JobOptions("m", **options), engine, Speed(rate, COPIED), narrow, memory, not engine.cross)


def by_stage(found: Job) -> dict[str, Needs]:
    return {stage.stage: stage for stage in found.needs()}


def off(estimated: float, measured: float) -> float:
    """The factor between two numbers, at least 1."""
    return max(estimated / measured, measured / estimated)


@pytest.fixture
def earlier_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts when the jobs were measured: half as many windows decided, and no passages came twice."""
    roles = {("deciding", "choosing", "deciding", "final", "final"): 4096,
             ("unused", "choosing", "choosing", "final", "deciding"): 8192}  # fmt: skip
    monkeypatch.setattr(windows, "_PART_TOKENS", roles)
    monkeypatch.setattr(windows, "_REPEATED", 0)
    assert windows.deciding_tokens(512) == windows.final_tokens(512) == 16384


@pytest.mark.parametrize(("name", "shape"), [("stages-smollm2", SMOLLM2), ("stages-qwen", QWEN)])
def test_whole_jobs_agree_with_what_was_measured(name: str, shape: Shape, earlier_windows: None) -> None:
    measured = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    rate = measured["tokens"] * job(shape)._pass / measured["plain_seconds"]
    found = by_stage(job(shape, rate, select="greedy"))
    assert set(found) == set(STAGES) - {"distill"}
    seconds = {stage: off(needs.seconds, measured["seconds"][stage]) for stage, needs in found.items()}
    assert max(seconds.values()) < WITHIN, seconds
    peaks = {
        stage: off(needs.peak_bytes, measured["stage_peak_bytes"]["decoder graph" if stage == "decoder" else stage])
        for stage, needs in found.items()
    }
    assert peaks.pop("rewrite") < 2  # it takes a second or two, of which five samples a second were taken
    assert max(peaks.values()) < WITHIN, peaks
    assert off(max(needs.peak_bytes for needs in found.values()), measured["peak_bytes"]) < WITHIN
    assert off(sum(needs.seconds for needs in found.values()), measured["total_seconds"]) < WITHIN


@pytest.mark.parametrize(("size", "shape"), [("3B", QWEN_3B), ("8B", LLAMA_8B)])
def test_layer_by_layer_agrees_with_what_was_measured(size: str, shape: Shape) -> None:
    measured = json.loads((RESULTS / f"shapes-{size.lower()}.json").read_text(encoding="utf-8"))["shapes"][size]
    asked = {name: measured[name] for name in ("select", "precision")}
    streamed = job(
        shape, measured["speed"]["product_flops_per_second"], measured["speed"]["memory_bytes"],
        calibration_tokens=measured["tokens"], layers=str(measured["layers"] // 4), depths=(0,), repetitions=2, **asked,
    )  # fmt: skip
    assert not streamed.fits
    found = by_stage(streamed)
    assert off(shape.parameters, measured["parameters"]) < 1.001
    ran = [stage for stage in STAGES if stage in measured and stage != "rewrite"]  # it takes seconds
    assert {"calibrate", "plan", "decoder"} <= set(ran)
    seconds = {stage: off(found[stage].seconds, measured[stage]["seconds"]) for stage in ran}
    assert all(factor < FURTHER.get((size, stage), WITHIN) for stage, factor in seconds.items()), seconds
    peaks = {stage: off(found[stage].peak_bytes, measured[stage]["peak_bytes"]) for stage in ran}
    assert max(peaks.values()) < WITHIN, peaks


# -- options --------------------------------------------------------------------------------------------------


def test_a_stage_that_does_not_run_is_left_out() -> None:
    assert "distill" in by_stage(job(SMOLLM2, fit="distilled"))
    assert "distill" not in by_stage(job(LLAMA_8B, fit="distilled"))  # it does not fit into memory
    assert "bench" not in by_stage(job(SMOLLM2, engine="trt", precision="fp16", decoder_source="static"))
    given = by_stage(job(dataclasses.replace(SMOLLM2, is_gguf=False, maps_tap="residual"), fit="given"))
    assert list(given) == ["decoder", "rewrite", "verify", "bench"]
    assert given["decoder"].disk_bytes == pytest.approx(2 * 4 * SMOLLM2.parameters)  # the stock checkpoint too


def test_time_follows_the_options() -> None:
    def seconds(stage: str, **options: Any) -> float:
        return by_stage(job(SMOLLM2, **options))[stage].seconds

    short, long = (seconds("calibrate", calibration_tokens=n) for n in (65536, 131072))
    assert short < long < 2 * short
    assert seconds("calibrate", tap="normed") > short  # two taps
    assert by_stage(job(SMOLLM2, narrow=False))["calibrate"].seconds > short
    assert by_stage(job(SMOLLM2, rate=1e11))["verify"].seconds > seconds("verify")
    assert seconds("plan", layers="8", window_layers="auto") > seconds("plan", layers="8", window_layers="none")
    named, counted, decided = (seconds("plan", **asked) for asked in ({"layers": "1,2"}, {"layers": "8"}, {}))
    assert named < counted < decided
    # a training begins with more layers than stay, and the limit is tested after it
    assert counted < seconds("plan", fit="distilled") < decided
    assert seconds("distill", fit="distilled", layers="8", distill_minutes=3) == 180
    limited = seconds("distill", fit="distilled", distill_minutes=3)  # the tests of the limit come after it
    assert 180 < limited < seconds("distill", fit="distilled")
    assert seconds("bench", repetitions=12) == pytest.approx(2 * seconds("bench", repetitions=6))


def test_quantised_graphs_are_smaller_and_have_a_twin() -> None:
    plain, coded = (by_stage(job(LLAMA_8B, memory=200 * GIB, precision=name)) for name in ("fp32", "int4"))
    assert coded["rewrite"].disk_bytes < plain["rewrite"].disk_bytes / 4
    assert coded["verify"].seconds > plain["verify"].seconds
    assert coded["bench"].peak_bytes < plain["bench"].peak_bytes


def test_needed_memory_is_at_most_the_peak() -> None:
    for memory in (4 * GIB, 23 * GIB, 400 * GIB):
        for shape in (SMOLLM2, LLAMA_8B):
            for stage in job(shape, memory=memory, fit="distilled").needs():
                assert 0 <= stage.needed_bytes < stage.peak_bytes, stage
    assert by_stage(job(LLAMA_8B))["calibrate"].peak_bytes < 8 * GIB < 32 * GIB
    assert by_stage(job(LLAMA_8B, precision="int4"))["verify"].needed_bytes < 8 * GIB  # one layer at a time
    assert by_stage(job(LLAMA_8B, memory=400 * GIB))["calibrate"].peak_bytes > 32 * GIB


def test_an_export_out_of_mapped_files_needs_no_memory_for_them() -> None:
    def needed(**asked: Any) -> float:
        return by_stage(job(LLAMA_8B, **asked))["decoder"].needed_bytes

    weights = 4 * LLAMA_8B.parameters
    assert needed(precision="int4") < 0.6 * weights
    assert needed(engine="openvino", decoder_source="openvino", precision="int8") < 0.6 * weights
    assert needed(engine="openvino", decoder_source="openvino", precision="fp16") > weights
    assert needed(precision="fp16", decoder_source="mobius") > weights


def test_gains_are_those_of_the_cost_model() -> None:
    found = job(SMOLLM2, layers="10").gains()
    assert [gain.layers for gain in found] == [4, 8, 10, 11, 15]
    costs, size = job(SMOLLM2).costs, LayerSizes((Read(),), (TokenWork(576 * 576, 576 * 576),))
    expected = costs.speedup_of_sizes(dict.fromkeys(range(10, 20), size))
    assert (found[2].prefill, found[2].decode) == (expected.prefill, expected.decode)
    assert (
        found[2].prefill_last == costs.speedup_of_sizes(dict.fromkeys(range(20, 30), size)).prefill > expected.prefill
    )
    assert found[2].cache_bytes_per_token == 20 * 2 * 3 * 64 * 4
    assert job(SMOLLM2, fit="drop").gains()[1].prefill > found[1].prefill
    assert job(SMOLLM2, precision="fp16").gains()[0].cache_bytes_per_token == 26 * 2 * 3 * 64 * 2


def test_a_cache_budget_sets_the_count() -> None:
    assert job(SMOLLM2, kv_budget="15KiB").count == 20


def test_speed_of_this_machine() -> None:
    found = measure_speed()
    assert found.product_flops_per_second > 1e8
    assert found.copied_bytes_per_second > 1e8
    assert measure_speed() is found  # measured once
