"""The main job for a compiling engine, without a GPU: float32 copies, engines, resume, a bare build machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.run import accept as accepting
from nbl_export.run.progress import Ui
from nbl_export.targets import exporter_of
from nbl_export.targets.base import compiler
from nbl_export.targets.tensorrt import static_form
from nbl_export.targets.tensorrt.engine import TRT_RTX
from nbl_export.targets.tensorrt.record import read_record

from ..command import assert_refused, in_new_process, keys, nbl, stage_lines
from ..fake_engine import ChildHere, StandIn
from ..static_tiny import LAYERS, SPEC, maps_of, save_checkpoint
from ..verifying import verify_tiny

pytestmark = [pytest.mark.engine, pytest.mark.job, pytest.mark.process]

_PROBE = TRT_RTX.probe()
needs_rtx = pytest.mark.skipif(not _PROBE.available, reason=_PROBE.reason)
SLOTS = 128
SMALL = ("--calibration-tokens", "1024", *keys(context=64))


@pytest.fixture(scope="session")
def model(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose attention TensorRT has kernels for, with a tokenizer."""
    directory = save_checkpoint("mistral-window", tmp_path_factory.mktemp("compile"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(checkpoint("llama") / name, directory / name)
    return directory


@pytest.fixture(scope="session")
def command(model: Path, text: Path) -> tuple[object, ...]:
    return (
        "--model", model, "--calibration", text, *SMALL, "--engine", "trt-rtx", "--layers", "1", "--fit", "independent",
        "--max-seq-len", SLOTS, "--precision", "fp16",  # the stand-in runs on a CPU, which has no bf16
    )  # fmt: skip


@pytest.fixture(scope="session")
def compiled(command: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Never write to it."""
    output = tmp_path_factory.mktemp("compiled") / "run"
    done = nbl(*command, "--output", output)
    assert done.status == 0, done.err
    assert list(stage_lines(done)) == ["calibrate", "plan", "decoder graph", "rewrite", "verify", "report"]
    assert "\nbench: left out, " in done.err or "\nbench: done" in done.err
    return output


@pytest.fixture
def run(compiled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "run"))


@needs_rtx
def test_both_decoders_are_there_as_graphs_and_as_engines(compiled: Path) -> None:
    for name, kept in (("original", LAYERS), ("model", LAYERS - 1)):
        record = read_record(compiled / "engine" / name)
        assert (record.engine, record.precision, record.max_seq_len, record.cache_layers) == (
            "trt-rtx",
            "fp16",
            SLOTS,
            kept,
        )
        files = {p.name for p in (compiled / name).iterdir()}
        assert files >= {"decoder.onnx", "decoder.onnx.data", "all_logits.onnx", "tokenizer.json", "config.json"}
        files = {p.name for p in (compiled / "engine" / name).iterdir()}
        assert files >= {"decoder.engine", "tokenizer.json"} and not [n for n in files if n.endswith(".onnx")]
    facts = json.loads((compiled / "model" / "nbl.json").read_text(encoding="utf-8"))
    assert facts["cache_layers"] == [i for i in range(LAYERS) if i not in facts["replaced_layers"]]


@needs_rtx
def test_predicted_cache_bytes_are_the_engines_and_the_reports(compiled: Path) -> None:
    report = json.loads((compiled / "report.json").read_text(encoding="utf-8"))
    manifest = json.loads((compiled / "nbl.json").read_text(encoding="utf-8"))
    for subject, name, kept in (("original", "original", LAYERS), ("nbl", "model", LAYERS - 1)):
        predicted = SPEC.cache_bytes_per_token(kept, 2)
        inputs = [i for i in read_record(compiled / "engine" / name).inputs if i.name.startswith("past_key_values.")]
        assert sum(2 * int(np.prod([int(n) for n in i.shape[1:]])) for i in inputs) == predicted * SLOTS
        assert report["engines"][subject]["cache_bytes"] == predicted * SLOTS
        assert report["cache_bytes_per_token"][subject] == predicted
        assert report["engines"][subject]["attention"] == "fused"
        assert report["engines"][subject]["build_seconds"] == manifest["engines"][subject]["build_seconds"] > 0
    page = (compiled / "report.md").read_text(encoding="utf-8")
    assert "Build time" in page and "KV cache of all slots" in page


@needs_rtx
def test_the_ladder_stands_on_float32_copies(compiled: Path) -> None:
    result = json.loads((compiled / "verify.json").read_text(encoding="utf-8"))
    assert result["passed"] and result["precision"] == "fp16"
    checks = [(r["check"], r["subject"]) for r in result["checks"]]
    assert {("exporter", "original"), ("original", "original"), ("nbl", "nbl"), ("text", "nbl")} <= set(checks)
    wiring = [r for r in result["checks"] if r["check"] in ("original", "nbl", "last_token")]
    assert wiring and all(r["value"] < 1e-5 for r in wiring)
    assert sum("with all logits, pruned" in r["metric"] for r in result["checks"]) == 2
    assert [r["subject"] for r in result["checks"] if r["check"] == "last_token"] == ["original"] * 3 + ["nbl"] * 3
    assert result["quality_loss"]


@needs_rtx
def test_its_graphs_are_evaluated_by_float32_copies(run: Path, text: Path) -> None:
    done = nbl("eval", run, "--perplexity", f"held={text}", "--ppl-context", 64, "--limit", 2)
    assert done.status == 0, done.err
    (row,) = json.loads((run / "eval.json").read_text(encoding="utf-8"))["table"]
    assert {name for name, figure in row["figures"].items() if figure["value"] > 1} == {"original", "nbl"}
    refused = nbl("eval", run, "--perplexity", f"held={text}", "--ppl-context", SLOTS + 1)
    assert_refused(refused, 1, f"--ppl-context {SLOTS + 1} is beyond the model's {SLOTS} positions")


@pytest.mark.trt
@needs_rtx
def test_accept_passes_on_a_stand_in(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines of the run are those of the graphs that the stand-in executes."""
    monkeypatch.setattr(accepting, "Child", ChildHere)
    found = accepting.accept(run, Ui(quiet=True), open_runner=StandIn().open)
    assert found["status"] == "verified", found
    assert {check["check"] for check in found["checks"]} == {"original", "nbl", "text", "last_token", "clock"}
    rows = {check["detail"] for check in found["checks"] if check["check"] == "nbl"}
    assert f"one sequence of {SLOTS} tokens" in rows


@needs_rtx
def test_the_same_command_reuses_and_a_changed_batch_only_compiles(run: Path, command: tuple[object, ...]) -> None:
    again = nbl(*command, "--output", run)
    assert again.status == 0, again.err
    assert set(stage_lines(again).values()) == {"reused"}
    changed = nbl("build", run, *keys(max_batch=2))
    assert (changed.status, changed.out.strip()) == (0, str(run / "engine" / "model")), changed
    assert set(stage_lines(changed).values()) == {"reused"}
    assert "\nbuild: done" in changed.err
    assert read_record(run / "engine" / "model").max_batch == 2


@needs_rtx
def test_a_build_machine_needs_neither_torch_nor_the_checkpoint(run: Path) -> None:
    """Of onnx, which the extras of both libraries bring, it needs what reads a file."""
    absent = ("torch", "transformers", "onnx_ir", "onnxruntime", "onnxruntime_genai", "mobius", "optimum")
    code = f"sys.modules.update(dict.fromkeys({absent!r}))"
    manifest = json.loads((run / "nbl.json").read_text(encoding="utf-8"))
    manifest["places"] = {"model": "/gone", "calibration": ["/gone"]}
    (run / "nbl.json").write_text(json.dumps(manifest), encoding="utf-8")
    shutil.rmtree(run / "engine")
    done = in_new_process("build", run, *keys(prefill_chunk=16), code=code)
    assert done.status == 0, done.err
    assert read_record(run / "engine" / "model").prefill_chunk == 16


@needs_rtx
def test_what_cannot_run_here_says_so(run: Path) -> None:
    if TRT_RTX.probe(run=True).available:
        pytest.skip("this machine runs engines")
    for arguments in (("bench", run), ("generate", run, "hello"), ("generate", run / "engine" / "model", "hello")):
        done = nbl(*arguments)
        assert done.status == 1
        assert "no NVIDIA driver" in done.err.splitlines()[-1], done.err


@pytest.mark.parametrize(
    ("file", "failed"), [("decoder.onnx", {"structure"}), ("all_logits.onnx", {"structure", "nbl", "text"})]
)
def test_a_fault_in_what_ships_is_caught(file: str, failed: set[str], model: Path, tmp_path: Path) -> None:
    """Keys and values of a layer go out exchanged, in one of both graphs."""
    real = compiler(exporter_of("static")).write_float32

    def broken(directory: Path, out: Path) -> None:
        if directory.name == "model":
            exchange_keys_and_values(directory / file)
        real(directory, out)

    with mock.patch.object(type(exporter_of("static")), "write_float32", side_effect=broken):
        found = verify_tiny(model, "static", "fp16", tmp_path, (0, 2), mixer_of=lambda i: maps_of([i])[i])
    assert {r.check for r in found if not r.passed} == failed


def exchange_keys_and_values(path: Path) -> None:
    broken = ir.load(path)
    key, value = (next(v for v in broken.graph.outputs if v.name == f"present.0.{p}") for p in ("key", "value"))
    key.name, value.name = value.name, key.name
    ir.save(broken, path)


@needs_rtx
def test_all_logits_on_request(run: Path, command: tuple[object, ...]) -> None:
    done = nbl(*command, "--output", run, *keys(context=64, logits="all"))
    assert done.status == 0, done.err
    assert stage_lines(done)["calibrate"] == "reused"
    assert not list(run.rglob("all_logits.onnx"))
    record = read_record(run / "engine" / "model")
    assert "num_tokens" not in {i.name for i in record.inputs}
    assert [o.shape[1] for o in record.outputs if o.name == "logits"] == ["tokens"]
    checks = json.loads((run / "verify.json").read_text(encoding="utf-8"))["checks"]
    assert all(r["passed"] for r in checks) and not [r for r in checks if r["check"] == "last_token"]


@needs_rtx
def test_what_cannot_be_compiled_is_refused_before_any_work(command: tuple[object, ...], tmp_path: Path) -> None:
    done = nbl(*command, *keys(context=64, prefill_chunk=SLOTS + 1), "--output", tmp_path / "run")
    assert_refused(done, 1, "key prefill_chunk 129", "--max-seq-len 128")
    assert not (tmp_path / "run").exists()


def test_tensorrt_without_its_library_is_refused_before_any_work(same: tuple[object, ...], tmp_path: Path) -> None:
    from nbl_export.targets.tensorrt.engine import TRT

    if TRT.probe().available:
        pytest.skip("TensorRT works here")
    done = nbl(*same, "--engine", "trt", "--output", tmp_path / "run")
    assert_refused(done, 1, "engine trt is not available here", "--engine trt-rtx builds without a GPU")
    assert not (tmp_path / "run").exists()


def test_the_precisions_of_the_static_source_are_stated_twice_alike() -> None:
    assert tuple(static_form.PRECISIONS) == exporter_of("static").capabilities.sources["static"]
