"""ONNX Runtime's GPU providers: exported and proven here, opened as far as a machine without a GPU goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from nbl_export.targets import load_engine
from nbl_export.targets.gpu import Gpu
from nbl_export.targets.onnx import engine as ort
from nbl_export.targets.onnx import gpu
from nbl_export.targets.onnx.facts import provider_of

from ..command import assert_refused, nbl

Same = tuple[object, ...]
HOPPER = Gpu("NVIDIA H100", "9.0", (13, 0))


def export(same: Same, output: Path, flag: str, precision: str, *more: object) -> Any:
    return nbl(*same, "--provider", flag, "--precision", precision, "--layers", "0,2", *more, "--output", output)


@pytest.mark.parametrize("precision", ["int4", "fp16"])
def test_directories_are_proven_without_a_gpu(same: Same, tmp_path: Path, precision: str) -> None:
    """Through the whole main job; the graph is the provider's own, and the maps are read back out of it."""
    done = export(same, tmp_path / "run", "cuda", precision)
    assert done.status == 0, done.err
    assert "bench: left out, the graphs do not run on this machine: " in done.err
    verify = json.loads((tmp_path / "run" / "verify.json").read_text())
    assert verify["passed"]
    assert {r["detail"] for r in verify["checks"] if r["metric"] == "maps in the graph"} == {
        "none planned",
        "2 maps as fitted",
    }
    for variant, kept in (("original", (0, 1, 2)), ("model", (1,))):
        directory = tmp_path / "run" / variant
        assert provider_of(directory) == "cuda"
        settings = json.loads((directory / "genai_config.json").read_text())["model"]["decoder"]
        assert settings["num_hidden_layers"] == 3
        graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
        keys = [i.name for i in graph.input if i.name.endswith(".key")]
        assert keys == [f"past_key_values.{i}.key" for i in kept]
        assert {i.type.tensor_type.elem_type for i in graph.input if "past" in i.name} == {onnx.TensorProto.FLOAT16}


def test_the_proof_runs_on_the_cpu_provider(same: Same, tmp_path: Path) -> None:
    """Although the directory asks for a GPU, which opening it plainly would need."""
    run = tmp_path / "run"
    assert export(same, run, "cuda", "fp16").status == 0
    with load_engine("ort", "cuda").open_checked(run / "model") as runner:
        assert len(runner.greedy([5, 6, 7], 4)) == 4
    assert_refused(nbl("generate", run, "Hi"), 1, "provider cuda is not available here: ")
    assert_refused(nbl("generate", run / "model", "Hi"), 1, "provider cuda is not available here: ")
    assert_refused(nbl("bench", run), 1, "nothing to bench here: ")


def test_refusals(same: Same, tmp_path: Path) -> None:
    """Before anything is computed or written."""
    for provider, sentence in (
        ("tensorrt", "--engine trt is TensorRT itself"),
        ("rocm", "unknown provider 'rocm'; --provider is one of cpu, cuda"),
    ):
        assert_refused(nbl(*same, "--provider", provider, "--output", tmp_path / "run"), 2, sentence)
        assert not (tmp_path / "run").exists()


def test_what_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: set[str] = set()
    monkeypatch.setattr(ort, "is_installed", lambda name: name in installed)
    monkeypatch.setattr(gpu, "find_gpu", lambda: "no NVIDIA driver is installed")
    monkeypatch.setattr(gpu, "load_cuda", lambda: None)
    cuda = load_engine("ort", "cuda")

    def reason(engine: Any) -> str:
        answer = engine.probe_run()
        assert not answer.available
        assert "\n" not in answer.reason
        return str(answer.reason)

    assert reason(cuda) == ("onnxruntime-gpu, onnxruntime-genai-cuda are not installed: pip install 'nbl-export[gpu]'")
    installed |= {"onnxruntime", "onnxruntime-genai"}
    assert "pip uninstall onnxruntime onnxruntime-genai, then pip install 'nbl-export[gpu]'" in reason(cuda)
    installed.clear()
    installed |= {"onnxruntime-gpu", "onnxruntime-genai-cuda"}
    assert reason(cuda) == "no NVIDIA driver is installed"
    monkeypatch.setattr(gpu, "find_gpu", lambda: HOPPER)
    assert cuda.probe_run().reason == "CUDA provider on the NVIDIA H100 (9.0)"
    monkeypatch.setattr(gpu, "find_gpu", lambda: Gpu("old", "7.0", (13, 0)))  # Volta, for which there are no kernels
    assert "its compute capability is 7.0" in reason(cuda)


def test_provider_of_a_damaged_directory_is_the_cpu(tmp_path: Path) -> None:
    assert provider_of(tmp_path) == "cpu"
    (tmp_path / "genai_config.json").write_text("{")
    assert provider_of(tmp_path) == "cpu"
