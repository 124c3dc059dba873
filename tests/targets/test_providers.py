"""ONNX Runtime's CUDA provider: exported and proven here, opened as far as a machine without a GPU goes."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from nbl_export.errors import NblError
from nbl_export.targets import load_engine
from nbl_export.targets.gpu import Gpu
from nbl_export.targets.onnx import engine as ort
from nbl_export.targets.onnx import gpu
from nbl_export.targets.onnx.facts import provider_of
from nbl_export.targets.onnx.gpu import load_cuda

from ..command import assert_refused, nbl

pytestmark = pytest.mark.job

Same = tuple[object, ...]
HOPPER = Gpu("NVIDIA H100", "9.0", (13, 0))
ADA = Gpu("NVIDIA RTX 4090", "8.9", (13, 0))
OLD_DRIVER = Gpu("NVIDIA L4", "8.9", (12, 8))
MISSING = "libcublasLt.so.13: cannot open shared object file: No such file or directory"


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
        answer = engine.probe(run=True)
        assert not answer.available
        assert "\n" not in answer.reason
        return str(answer.reason)

    assert reason(cuda) == (
        "onnxruntime-gpu, onnxruntime-genai-cuda are not installed: pip install '.[gpu]' in a clone of nbl-export"
    )
    installed |= {"onnxruntime", "onnxruntime-genai"}
    assert "pip uninstall onnxruntime onnxruntime-genai, then pip install '.[gpu]' in a clone of nbl-export" in reason(
        cuda
    )
    installed.clear()
    installed |= {"onnxruntime-gpu", "onnxruntime-genai-cuda"}
    assert reason(cuda) == "no NVIDIA driver is installed"
    monkeypatch.setattr(gpu, "find_gpu", lambda: HOPPER)
    assert cuda.probe(run=True).reason == "CUDA provider on the NVIDIA H100 (9.0)"
    monkeypatch.setattr(gpu, "find_gpu", lambda: Gpu("old", "7.0", (13, 0)))  # Volta, for which there are no kernels
    assert "its compute capability is 7.0" in reason(cuda)


def test_provider_of_a_damaged_directory_is_the_cpu(tmp_path: Path) -> None:
    assert provider_of(tmp_path) == "cpu"
    (tmp_path / "genai_config.json").write_text("{")
    assert provider_of(tmp_path) == "cpu"


class Machine:
    """The dynamic linker and onnxruntime of a machine where pip installed all packages.

    It opens GenAI's library only if CUDA's libraries were preloaded, as the dynamic linker does.
    """

    def __init__(self) -> None:
        self.preloads = True
        self.preloaded = False
        self.calls: list[str] = []

    def preload_dlls(self) -> None:
        sys.stdout.write("Failed to load libcudnn.so.9: it is optional\n")
        self.preloaded = self.preloads

    def open(self, name: str) -> None:
        self.calls.append(Path(name).name)
        if not self.preloaded:
            raise OSError(MISSING)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    found = Machine()
    onnxruntime, genai = types.ModuleType("onnxruntime"), types.ModuleType("onnxruntime_genai")
    vars(onnxruntime).update(preload_dlls=found.preload_dlls)
    genai.__file__ = str(tmp_path / "onnxruntime_genai" / "__init__.py")
    monkeypatch.setitem(sys.modules, "onnxruntime", onnxruntime)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", genai)
    monkeypatch.setattr(gpu.ctypes, "CDLL", found.open)
    monkeypatch.setattr(gpu, "find_gpu", lambda: ADA)
    monkeypatch.setattr(ort, "is_installed", lambda name: name in gpu.PACKAGES)
    load_cuda.cache_clear()
    yield found
    load_cuda.cache_clear()


def test_cudas_libraries_are_loaded_before_genais(machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    load_cuda()
    assert machine.calls == [gpu._GENAI_CUDA]
    assert capfd.readouterr().out == "", "a library's remark is no result"
    assert load_engine("ort", "cuda").probe(run=True).reason == "CUDA provider on the NVIDIA RTX 4090 (8.9)"


def test_the_probe_opens_the_library_itself(machine: Machine) -> None:
    """Packages, driver and GPU are there; CUDA's libraries are not."""
    machine.preloads = False
    answer = load_engine("ort", "cuda").probe(run=True)
    assert not answer.available
    assert f"GenAI's CUDA library does not load: {MISSING}" in answer.reason
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in answer.reason
    assert "\n" not in answer.reason
    with pytest.raises(NblError, match="libcublasLt"):
        load_engine("ort", "cuda").open_runner(Path("anywhere"))


def test_an_old_driver_is_named_before_packages_are_fetched_for_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "is_installed", lambda name: False)
    assert "pip install '.[gpu]' in a clone of nbl-export" in load_engine("ort", "cuda").probe(run=True).reason
    monkeypatch.setattr(gpu, "find_gpu", lambda: OLD_DRIVER)
    reason = load_engine("ort", "cuda").probe(run=True).reason
    assert "supports CUDA 12.8" in reason and "onnxruntime-gpu needs CUDA 13: update the driver to R580" in reason
    assert "pip install" not in reason
