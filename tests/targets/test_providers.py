"""ONNX Runtime's GPU providers: exported and proven here, opened as far as a machine without a GPU goes."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import onnx
import pytest

from nbl_export.targets import load_engine
from nbl_export.targets.gpu import Gpu
from nbl_export.targets.onnx import engine as ort
from nbl_export.targets.onnx import gpu
from nbl_export.targets.onnx.facts import provider_of
from nbl_export.targets.onnx.genai import CPU, GenaiRunner
from nbl_export.targets.providers import PROVIDERS
from nbl_export.targets.runners import SequenceLimits

from ..command import assert_refused, nbl

Same = tuple[object, ...]
ADA = Gpu("NVIDIA RTX 4090", "8.9", (13, 0))
HOPPER = Gpu("NVIDIA H100", "9.0", (13, 0))


def export(same: Same, output: Path, flag: str, precision: str, *more: object) -> Any:
    return nbl(*same, "--provider", flag, "--precision", precision, "--layers", "0,2", *more, "--output", output)


@pytest.mark.parametrize(("flag", "precision"), [("cuda", "int4"), ("nv-tensorrt-rtx", "fp16")])
def test_directories_are_proven_without_a_gpu(same: Same, tmp_path: Path, flag: str, precision: str) -> None:
    """Through the whole main job; the graph is the provider's own, and the maps are read back out of it."""
    done = export(same, tmp_path / "run", flag, precision)
    assert done.status == 0, done.err
    assert "bench: left out, the graphs do not run on this machine: " in done.err
    verify = json.loads((tmp_path / "run" / "verify.json").read_text())
    assert verify["passed"]
    assert {r["detail"] for r in verify["checks"] if r["metric"] == "maps in the graph"} == {
        "none planned",
        "2 maps as fitted",
    }
    for variant, layers in (("original", 3), ("model", 1)):
        directory = tmp_path / "run" / variant
        assert provider_of(directory) == flag
        settings = json.loads((directory / "genai_config.json").read_text())["model"]["decoder"]
        dense = PROVIDERS[flag].dense_caches
        assert settings["num_hidden_layers"] == (layers if dense else 3)
        graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
        keys = [i.name for i in graph.input if i.name.endswith(".key")]
        kept = range(layers) if dense or layers == 3 else (1,)
        assert keys == [f"past_key_values.{i}.key" for i in kept]
        assert {i.type.tensor_type.elem_type for i in graph.input if "past" in i.name} == {onnx.TensorProto.FLOAT16}


def test_a_wrong_map_in_int4_blocks_is_seen(same: Same, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert export(same, run, "nv-tensorrt-rtx", "int4").status == 0
    path = run / "model" / "model.onnx"
    graph = onnx.load(path)
    scale = next(t for t in graph.graph.initializer if t.name == "nbl.layers.2.weight_scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * 2, scale.name))
    onnx.save(graph, path, save_as_external_data=True, location="model.onnx.data")

    from nbl_export.plan.maps_file import load_maps
    from nbl_export.targets import onnx_files as files
    from nbl_export.targets.checks import judge_maps

    maps = load_maps(run / "maps.safetensors", (0, 2))
    found = judge_maps("nbl", files.held_maps(run / "model"), maps)
    assert not found.passed
    assert found.detail == "layer 2's weight is not the fitted one"


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
        ("tensorrt", "use --provider nv-tensorrt-rtx, or --engine trt"),
        ("rocm", "unknown provider 'rocm'; --provider is one of cpu, cuda, nv-tensorrt-rtx"),
    ):
        assert_refused(nbl(*same, "--provider", provider, "--output", tmp_path / "run"), 2, sentence)
        assert not (tmp_path / "run").exists()


def test_genai_does_not_know_tensorrt(genai_dirs: dict[str, Path]) -> None:
    """The reason of the refusal above; when this fails, there is something new to offer."""
    import onnxruntime_genai as og

    for name in ("tensorrt", "TensorRT", "TensorrtExecutionProvider"):
        config = og.Config(str(genai_dirs["nbl"]))
        config.append_provider(name)
        with pytest.raises(Exception, match="Unknown provider name"):
            og.Model(config)


def test_what_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: set[str] = set()
    monkeypatch.setattr(ort, "is_installed", lambda name: name in installed)
    monkeypatch.setattr(gpu, "find_gpu", lambda: "no NVIDIA driver is installed")
    monkeypatch.setattr(gpu, "check_cuda", lambda card: None)
    cuda, rtx = load_engine("ort", "cuda"), load_engine("ort", "nv-tensorrt-rtx")

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
    assert "onnxruntime-ep-nv-tensorrt-rtx is not installed: pip install 'nbl-export[nv-tensorrt-rtx]'" in reason(rtx)
    installed.add("onnxruntime-ep-nv-tensorrt-rtx")
    monkeypatch.setattr(gpu, "find_gpu", lambda: HOPPER)
    assert re.search("H100: its compute capability is 9.0, .*; use --provider cuda", reason(rtx))
    assert cuda.probe_run().reason == "CUDA provider on the NVIDIA H100 (9.0)"


class Genai(types.ModuleType):
    """onnxruntime_genai as far as opening a model goes; notes what it is asked."""

    def __init__(self) -> None:
        super().__init__("onnxruntime_genai")
        self.calls: list[tuple[object, ...]] = []

    def register_execution_provider_library(self, name: str, path: str) -> None:
        self.calls.append(("register", name, path))
        if path == "broken":
            raise RuntimeError("libcuda.so.1: cannot open\nshared object file")

    def __getattr__(self, name: str) -> Any:
        def noted(*arguments: object, **_options: object) -> Genai:
            self.calls.append((name, *arguments))
            return self

        return noted


@pytest.fixture
def genai(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Genai:
    """A stand-in for both libraries, and a cache directory of the test's own."""
    module = Genai()
    package = types.ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    package.get_library_path = lambda: "library.so"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", module)
    monkeypatch.setattr(gpu, "_registered", set())
    monkeypatch.setattr(ort, "is_installed", lambda name: name in PROVIDERS["nv-tensorrt-rtx"].packages)
    monkeypatch.setattr(gpu, "find_gpu", lambda: ADA)
    monkeypatch.setattr(gpu, "check_cuda", lambda card: None)
    monkeypatch.setattr(gpu, "load_cuda", lambda: 13)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    return module


def test_the_rtx_provider_is_registered_once_and_keeps_its_kernels(
    genai: Genai, genai_dirs: dict[str, Path], tmp_path: Path
) -> None:
    rtx = load_engine("ort", "nv-tensorrt-rtx")
    assert rtx.probe_run().reason == "TensorRT for RTX provider on the NVIDIA RTX 4090 (8.9)"
    rtx.open_runner(genai_dirs["nbl"])
    registered = [call for call in genai.calls if call[0] == "register"]
    assert registered == [("register", "NvTensorRTRTXExecutionProvider", "library.so")]
    kernels = tmp_path / "cache" / "nbl-export" / "nv-tensorrt-rtx"
    assert ("set_provider_option", "NvTensorRtRtx", "nv_runtime_cache_path", str(kernels)) in genai.calls
    assert kernels.is_dir()
    assert not any(call[0] == "clear_providers" for call in genai.calls)


def test_the_cuda_provider_is_left_as_the_directory_says(genai: Genai, genai_dirs: dict[str, Path]) -> None:
    load_engine("ort", "cuda").open_runner(genai_dirs["nbl"])
    assert not any(call[0] in ("register", "clear_providers", "set_provider_option") for call in genai.calls)
    GenaiRunner(genai_dirs["nbl"], provider=CPU)
    assert ("clear_providers",) in genai.calls


def sizes(genai: Genai) -> list[tuple[int, int]]:
    """Context length and batch size that each model was opened with."""
    found, asked = [], (0, 0)
    for name, *arguments in genai.calls:
        if name == "overlay":
            settings = json.loads(str(arguments[0]))
            asked = settings["model"].get("context_length", 0), settings.get("search", {}).get("batch_size", 0)
        elif name == "Model":
            found.append(asked)
    return found


def test_the_rtx_provider_is_sized_for_what_is_asked(genai: Genai, genai_dirs: dict[str, Path]) -> None:
    """Before the model is opened, because GenAI makes the provider's only profile then."""
    directory = genai_dirs["nbl"]
    context = json.loads((directory / "genai_config.json").read_text())["model"]["context_length"]
    rtx = load_engine("ort", "nv-tensorrt-rtx")
    runner = rtx.open_runner(directory, limits=SequenceLimits(24, 2))
    runner.begin(24)
    runner.begin(23, 2)  # and a token that is picked last
    assert sizes(genai) == [(24, 2)]
    runner.begin(25)
    runner.begin(24, 3)
    assert sizes(genai) == [(24, 2), (25, 2), (25, 3)]
    rtx.open_runner(directory)
    rtx.open_runner(directory, limits=SequenceLimits(10 * context))
    assert sizes(genai)[3:] == [(min(4096, context), 1), (context, 1)]
    load_engine("ort", "cuda").open_runner(directory, limits=SequenceLimits(24, 2)).begin(25, 3)
    assert sizes(genai)[5:] == [(0, 0)], "caches of the CUDA provider grow by themselves"


def test_genai_takes_the_sizes(genai_dirs: dict[str, Path]) -> None:
    """On the CPU: a larger sequence is refused by GenAI itself, and a runner opens the model again."""
    import onnxruntime_genai as og

    with (
        GenaiRunner(genai_dirs["nbl"], 1, CPU, SequenceLimits(8)) as runner,
        GenaiRunner(genai_dirs["nbl"], 1) as plain,
    ):
        small = runner._model
        params = og.GeneratorParams(small)
        params.set_search_options(max_length=9)
        with pytest.raises(Exception, match=r"context_length \(8\)"):
            og.Generator(small, params)
        assert runner.greedy([5, 6, 7], 5) == plain.greedy([5, 6, 7], 5)
        assert runner._model is small
        assert runner.greedy([5, 6, 7], 9) == plain.greedy([5, 6, 7], 9)
        assert runner._model is not small


def test_a_provider_that_does_not_load_is_named(genai: Genai, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["onnxruntime_ep_nv_tensorrt_rtx"], "get_library_path", lambda: "broken")
    answer = load_engine("ort", "nv-tensorrt-rtx").probe_run()
    assert not answer.available
    assert answer.reason == (
        "the TensorRT for RTX provider does not load: libcuda.so.1: cannot open shared object file"
    )


def test_provider_of_a_damaged_directory_is_the_cpu(tmp_path: Path) -> None:
    assert provider_of(tmp_path) == "cpu"
    (tmp_path / "genai_config.json").write_text("{")
    assert provider_of(tmp_path) == "cpu"
