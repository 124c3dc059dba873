"""GenAI's CUDA library and pip's CUDA libraries, on a machine that has neither: the order of loading, and what is said.

The stand-in opens GenAI's library only if CUDA's libraries were preloaded, as the dynamic linker does.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbl_export.errors import NblError
from nbl_export.targets import load_engine
from nbl_export.targets.gpu import Gpu
from nbl_export.targets.onnx import engine as ort
from nbl_export.targets.onnx import gpu
from nbl_export.targets.onnx.gpu import load_cuda

ADA = Gpu("NVIDIA RTX 4090", "8.9", (13, 0))
OLD_DRIVER = Gpu("NVIDIA L4", "8.9", (12, 8))
MISSING = "libcublasLt.so.13: cannot open shared object file: No such file or directory"


class Machine:
    """The dynamic linker and onnxruntime of a machine where pip installed all packages."""

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
    assert load_engine("ort", "cuda").probe_run().reason == "CUDA provider on the NVIDIA RTX 4090 (8.9)"


def test_the_probe_opens_the_library_itself(machine: Machine) -> None:
    """Packages, driver and GPU are there; CUDA's libraries are not."""
    machine.preloads = False
    answer = load_engine("ort", "cuda").probe_run()
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
    assert "pip install 'nbl-export[gpu]'" in load_engine("ort", "cuda").probe_run().reason
    monkeypatch.setattr(gpu, "find_gpu", lambda: OLD_DRIVER)
    reason = load_engine("ort", "cuda").probe_run().reason
    assert "supports CUDA 12.8" in reason and "onnxruntime-gpu needs CUDA 13: update the driver to R580" in reason
    assert "pip install" not in reason
