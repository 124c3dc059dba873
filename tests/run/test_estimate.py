"""`nbl-export estimate`, what the main job says before it begins, and what it then refuses."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbl_export.errors import NblError
from nbl_export.methods.checkpoint.shape import read_shape
from nbl_export.options.settle import settle
from nbl_export.records.paired import paired_ratio
from nbl_export.run import estimate as estimating
from nbl_export.run.estimate import estimate
from nbl_export.run.settled import capabilities_of
from tests.methods.checkpoint.test_shape import written

from ..command import assert_refused, in_new_process, nbl
from ..fake_hub import fake_hub
from ..jobs import opened

pytestmark = [pytest.mark.job, pytest.mark.process]

ROOT = Path(__file__).parents[2]
Same = tuple[object, ...]
# What a manifest has after calibration.
_FIRST = ("schema", "status", "model", "decoder", "sources", "text", "calibration", "places", "num_layers", "options",
          "command", "stages")  # fmt: skip


def with_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(estimating.shutil, "disk_usage", lambda _path: SimpleNamespace(free=free))


# -- the command ----------------------------------------------------------------------------------------------


def test_an_8b_model_by_its_configuration_alone(tmp_path: Path) -> None:
    """In a fresh process: neither torch nor transformers is loaded, which would take seconds."""
    code = """
import atexit, sys
atexit.register(lambda: sys.stderr.write(",".join({"torch", "transformers", "onnxruntime"} & sys.modules.keys())))
"""
    done = in_new_process("estimate", written(tmp_path), "--precision", "int4", "--layers", 8, "--json", code=code)
    assert (done.status, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["parameters"] == 8029995008
    assert found["options"]["precision"] == "int4"
    assert [stage["stage"] for stage in found["stages"]] == [
        "calibrate", "plan", "decoder", "rewrite", "verify", "bench",
    ]  # fmt: skip
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))
    assert found["memory_bytes"] == max(stage["memory_bytes"] for stage in found["stages"])
    assert found["disk_bytes"] == pytest.approx(sum(stage["disk_bytes"] for stage in found["stages"]))
    assert found["replaced"] == 8
    said = [(gain["kind"], gain["layers"], gain["tokens"], gain["is_asked"]) for gain in found["gains"]]
    assert said == [
        ("linear maps", 8, 512, True), ("linear maps", 8, 2048, True),
        ("predicted KV", 11, 512, False), ("predicted KV", 11, 2048, False),
    ]  # fmt: skip
    assert min(gain["speedup"] for gain in found["gains"]) > 1
    assert found["busy_seconds"] == pytest.approx(found["seconds"] / found["machine"]["share"])
    assert [sentence.partition(":")[0] for sentence in found["expected"]] == ["method", "loss", "gain"]


@pytest.mark.parametrize("name", ["org/model", "https://huggingface.co/org/model/tree/main"])
def test_a_model_of_the_hub_by_its_configuration_alone(name: str, tmp_path: Path) -> None:
    with fake_hub() as hub:
        hub.configs["org/model"] = written(tmp_path).read_text(encoding="utf-8")
        environment = hub.environment(tmp_path / "home")
        done = in_new_process("estimate", name, "--precision", "int4", "--layers", 8, "--json", **environment)
        gone = in_new_process("estimate", "org/other", **environment)
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert (found["model"], found["parameters"]) == ("org/model", 8029995008)
    assert {path.partition("?")[0] for _, path, _ in hub.requests} == {
        f"/org/{name}/resolve/main/config.json" for name in ("model", "other")
    }  # fmt: skip
    assert_refused(gone, 1, "no model org/other: no such local directory, and the hub does not have it")


def test_the_table_has_a_row_for_each_stage(checkpoint: Callable[[str], Path]) -> None:
    shown = nbl("estimate", checkpoint("llama"), "--fit", "distilled")
    assert shown.status == 0, shown.err
    for word in ("calibrate", "plan", "distill", "decoder", "rewrite", "verify", "bench", "whole job"):
        assert word in shown.out
    assert re.search(r"The job takes [\d.]+ (to [\d.]+ )?(s|minutes)", shown.out)
    assert "refused" not in shown.out
    assert re.search(r"1 layer with linear maps +│ +512 │ +1\.\d\d×", shown.out), shown.out


def with_memory(monkeypatch: pytest.MonkeyPatch, gib: int) -> None:
    """Memory that the choice of defaults sees."""
    monkeypatch.setattr("nbl_export.model.memory.available_bytes", lambda: gib << 30)


def test_options_are_settled_as_in_the_main_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 8B that does not fit into memory gets a job that does: int4, one layer at a time."""
    model = written(tmp_path)
    for gib, precision in ((20, "int4"), (200, "int8")):
        with_memory(monkeypatch, gib)
        monkeypatch.setattr(estimating, "available_bytes", lambda gib=gib: gib << 30)
        with_disk(monkeypatch, 1 << 40)
        found = estimate(str(model), {})
        assert (found["options"]["precision"], found["refused"]) == (precision, "")
    assert estimate(str(model), {"engine": "openvino"})["options"]["fit"] == "independent"
    assert estimate(str(model), {"layers": "8"})["options"]["fit"] == "independent"
    assert_refused(nbl("estimate", model, "--layers", "40"), 1, "all 32 attention layers")
    assert_refused(nbl("estimate", model, "--precision", "int3"), 2, "--precision int3 is not for engine ort")
    assert_refused(nbl("estimate", model, "--exit-layer", "20", "--distill-minutes", "3"), 2, "is for --fit distilled")


def test_a_job_with_an_exit_layer_has_sums_of_its_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named exit layer sums less than all candidates, and a lower exit layer gains more of a prompt."""
    with_memory(monkeypatch, 200)
    model = str(written(tmp_path))
    auto, low, high = (estimate(model, asked) for asked in ({}, {"exit_layer": "16"}, {"exit_layer": "28"}))
    sums = [{row["stage"]: row["disk_bytes"] for row in found["stages"]}["calibrate"] for found in (auto, low, high)]
    assert sums[0] > sums[1] > sums[2] > 0
    assert low["gains"][-1]["speedup"] > high["gains"][-1]["speedup"] > 1


def test_what_kinds_can_give_an_engine_of_a_gpu(tmp_path: Path) -> None:
    """The 8B shape: with 8 layers of predicted KV, 24.9 layers are left of the 31.2 that the original computes."""
    shape = read_shape(str(written(tmp_path)))

    def said(**asked: Any) -> str:
        return estimating._describe_gain(estimating._job(shape, settle({"model": "m", **asked}, capabilities_of)))

    told = said(engine="trt", layers="8")
    assert re.search(
        r"about 1\.0[45]x as fast with linear maps in 8 of 32 layers, 1\.[45]\dx .* in 11 .*--exit-layer", told
    )
    told = said(engine="trt", exit_layer="24")
    assert re.search(r"about 1\.25x as fast with predicted KV in 8 of 32 layers", told) and "--exit-layer" not in told
    assert "--exit-layer" in said(engine="openvino", layers="8")
    assert "--exit-layer" in said(provider="cuda", layers="8")


def test_a_refusal_comes_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimating, "available_bytes", lambda: 4 << 30)
    with_disk(monkeypatch, 1 << 40)
    asked = {"precision": "int4", "layers": "8"}
    assert "of memory at least, and 4.00 GiB are available" in estimate(str(written(tmp_path)), asked)["refused"]
    for memory in (20, 200):  # one layer at a time, and the whole model
        monkeypatch.setattr(estimating, "available_bytes", lambda memory=memory: memory << 30)
        assert estimate(str(tmp_path), asked)["refused"] == ""
    with_disk(monkeypatch, 20 << 30)
    assert "the run needs 21.2 GiB of disk" in estimate(str(tmp_path), asked)["refused"]


# -- the main job ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["main", "calibrate"])
def test_a_disk_that_is_too_small_ends_the_job_before_it_begins(
    command: str, same: Same, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_disk(monkeypatch, 1000)
    words = same if command == "main" else ("calibrate", *same[:4])
    refused = nbl(*words, "--output", tmp_path / "new" / "run")
    assert_refused(refused, 1, "of disk, and")
    assert "has 1,000 B left: free some, or choose another --output" in refused.err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_fit_ends_the_job_before_it_begins(
    same: Same, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimating, "available_bytes", lambda: 1000)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for words in (("--output", tmp_path / "new"), ("--output", run, "--force")):
        assert_refused(nbl(*same, *words), 1, "of memory at least, and 1,000 B are available: close other programs")
    assert not (tmp_path / "new").exists()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before  # --force removed nothing


def test_a_job_says_what_it_takes(finished: Path, same: Same, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *expected = (finished.parent / "stderr").read_text(encoding="utf-8").splitlines()[:4]
    assert re.fullmatch(r"estimate: .+ s.*, at least .+ MiB of memory and .+ [KM]iB of disk", first)
    assert [sentence.partition(":")[0] for sentence in expected] == ["  method", "  loss", "  gain"]
    with_disk(monkeypatch, 0)
    monkeypatch.setattr(estimating, "available_bytes", lambda: 0)
    again = nbl(*same, "--output", run)  # nothing is left to do
    assert again.status == 0, again.err
    assert "estimate" not in again.err


def test_disk_is_that_of_a_finished_run(finished: Path, checkpoint: Callable[[str], Path]) -> None:
    job = estimating._job(read_shape(checkpoint("llama")), opened(finished).options)
    found = {stage.stage: stage.disk_bytes for stage in job.needs()}
    files = {"calibrate": "sums.safetensors", "plan": "maps.safetensors", "decoder": "original/model.onnx.data",
             "rewrite": "model/model.onnx.data"}  # fmt: skip
    left = {stage: (finished / name).stat().st_size for stage, name in files.items()}
    assert found["bench"] == 0
    assert {stage: found[stage] / left[stage] for stage in left} == pytest.approx(dict.fromkeys(left, 1), rel=0.2)


def test_processes_of_a_machine_hold_a_model_each(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbl_export.run.pipeline import STAGES

    needs = estimating._job(read_shape(opened(run).origin()), opened(run).options).needs()
    most = max(stage.memory_bytes for stage in needs)
    monkeypatch.setattr(estimating, "available_bytes", lambda: most)
    job = opened(run, context=32)
    left = estimating.stages_left(job, STAGES[:3])
    assert "estimate" in estimating.describe_estimate(job, left, run)
    calibrate = next(stage.memory_bytes for stage in needs if stage.stage == "calibrate")
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "40")
    assert 40 * calibrate > most
    with pytest.raises(NblError, match=r"the stage calibrate needs .* start fewer processes"):
        estimating.describe_estimate(job, left, run)


def test_one_process_converts_a_gguf_and_each_holds_its_layer(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = read_shape(opened(run).origin())
    alone = estimating._job(shape, opened(run).options)
    layer = next(need.memory_bytes for need in alone.needs() if need.stage == "calibrate")
    decoder = dataclasses.replace(shape.decoder, vocab_size=1 << 20)  # so that a layer is little of all weights
    job = dataclasses.replace(alone, shape=dataclasses.replace(shape, is_gguf=True, decoder=decoder))
    assert job.weights > 4 * layer
    many = 1 + int(job.weights / layer)
    for count, expected in ((1, job.weights), (4, job.weights), (many, many * layer)):
        monkeypatch.setattr(estimating.processes, "local", lambda count=count: count)
        found = next(n for n in estimating._of_all_processes(job, {"calibrate"}) if n.stage == "calibrate")
        assert found.memory_bytes == expected


def test_a_job_that_resumes_counts_what_is_left(run: Path, same: Same, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbl_export.run.pipeline import STAGES

    def left(**changes: Any) -> set[str]:
        found = {stage.name for stage in estimating.stages_left(opened(run, **changes), STAGES)}
        return found & {"calibrate", "plan", "decoder", "verify", "bench"}

    assert left() == set()
    assert left(layers="0") == {"plan", "verify", "bench"}
    assert left(context=32) == {"calibrate", "plan", "decoder", "verify", "bench"}  # int8 reads the text
    assert left(precision="fp32") == {"decoder", "verify", "bench"}
    manifest = json.loads((run / "nbl.json").read_text(encoding="utf-8"))
    del manifest["stages"]["bench"]
    (run / "nbl.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert left() == {"bench"}
    with_disk(monkeypatch, 0)  # bench writes next to nothing
    assert nbl(*same, "--output", run).status == 0
    manifest["stages"] = {name: manifest["stages"][name] for name in ("text", "calibrate")}
    (run / "nbl.json").write_text(json.dumps({n: v for n, v in manifest.items() if n in _FIRST}), encoding="utf-8")
    assert left() == {"plan", "decoder", "verify", "bench"}
    assert left(fit="distilled") == left()  # no stage is asked that would read the missing plan


# -- what is expected -----------------------------------------------------------------------------------------


def test_a_job_says_its_method_and_what_limits_its_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 200)
    model = str(written(tmp_path))

    def said(**asked: Any) -> dict[str, str]:
        return dict(sentence.split(": ", 1) for sentence in estimate(model, asked)["expected"])

    usual = said(max_perplexity_increase="2.5%")
    assert usual["method"].startswith("predicted KV above an exit layer, which the job chooses")
    assert "by 2.5% on each text" in usual["loss"] and "measured" in usual
    named = said(exit_layer="24")
    assert named["method"].startswith("predicted KV above layer 24") and named["loss"].startswith("not limited")
    linear = said(layers="8")
    assert linear["method"] == "linear layers in place of attention" and "measured" not in linear
    assert said(engine="openvino", layers="8")["method"] == "linear layers in place of attention"


def test_a_model_without_predicted_kv_learns_why(tmp_path: Path) -> None:
    shape = read_shape(str(written(tmp_path)))
    shape = dataclasses.replace(shape, decoder=dataclasses.replace(shape.decoder, architecture="qwen3"))
    options = settle({"model": "m", "engine": "trt", "layers": "8"}, capabilities_of)
    method = next(iter(estimating._expected(estimating._job(shape, options))))
    assert method.endswith("predicted KV is left out, since its attention is not that of llama, mistral, qwen2")


def test_measured_gains_are_those_of_the_raw_results() -> None:
    """Of the default jobs that stand in the README."""
    rows = json.loads((ROOT / "bench" / "results" / "exit-layers.json").read_text(encoding="utf-8"))["rows"]
    for row in rows[:2]:
        old, new = (
            next(each for each in row["rows"] if (each["variant"], each["test"]) == (variant, "pp2048"))
            for variant in ("original", "nbl")
        )
        gain = paired_ratio([1 / s for s in old["samples"]], [1 / s for s in new["samples"]], old["loads"]).ratio
        assert f"{gain:.2f}x for {row['title'].partition(',')[0]}" in estimating.MEASURED
