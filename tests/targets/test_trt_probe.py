"""What works on this machine and what is missing: libraries, driver, GPU; none of it has to be here."""

from __future__ import annotations

import enum
import importlib
import importlib.machinery
import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import NblError
from nbl_export.targets import gpu
from nbl_export.targets.gpu import Gpu, describe_gpu, find_gpu
from nbl_export.targets.tensorrt import device, engine
from nbl_export.targets.tensorrt import library as tensorrt_library
from nbl_export.targets.tensorrt.build import build_engine
from nbl_export.targets.tensorrt.engine import TRT, TRT_RTX
from nbl_export.targets.tensorrt.library import load_library

from ..trt_tiny import ADA, HOPPER, PLAIN, RTX, SMALL, graph_of, needs_rtx

pytestmark = pytest.mark.trt

# -- probes --------------------------------------------------------------------------------------------------


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name.startswith("tensorrt") else real(name, *a)
    )
    for engine_, package, more in (
        (TRT, "tensorrt", "NVIDIA's own package index"),
        (TRT_RTX, "tensorrt-rtx", "pip install tensorrt-rtx"),
    ):
        for answer in (engine_.probe(), engine_.probe(run=True)):
            assert not answer.available
            assert f"the package {package} is not installed" in answer.reason
            assert more in answer.reason
    assert "--engine trt-rtx builds without a GPU" in TRT.probe().reason


def stub(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A `tensorrt` that can be imported and nothing else."""
    module = types.ModuleType("tensorrt")
    module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    module.__version__ = "11.4.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def test_tensorrt_without_a_gpu_is_refused_before_its_library_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch)
    monkeypatch.setattr(engine, "find_gpu", lambda: "no NVIDIA driver is installed (libcuda is not found)")
    for answer in (TRT.probe(), TRT.probe(run=True)):
        assert not answer.available
        assert "no NVIDIA driver is installed" in answer.reason
    assert "--engine trt-rtx builds without a GPU" in TRT.probe().reason


def test_tensorrt_is_exercised_up_to_its_first_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = stub(monkeypatch)
    monkeypatch.setattr(engine, "find_gpu", lambda: HOPPER)
    answer = TRT.probe()
    assert not answer.available
    assert "tensorrt is installed and does not build: " in answer.reason
    assert "ILogger" in answer.reason
    calls: list[object] = []

    def builder(logger: object) -> None:
        calls.append(logger)
        raise TypeError("pybind11::init(): factory function returned nullptr")

    module.ILogger = type("ILogger", (), {"VERBOSE": 4})  # type: ignore[attr-defined]
    module.Builder = builder  # type: ignore[attr-defined]
    assert "factory function returned nullptr" in TRT.probe().reason
    with pytest.raises(NblError, match=r"^TensorRT makes no builder: TypeError: .*nullptr$"):
        build_engine(PLAIN, graph_of("llama"), tmp_path / "e", SMALL)
    assert len(calls) == 2
    assert isinstance(calls[0], module.ILogger)


class Backend:
    """A package whose stream is made and freed."""

    open = 0

    def __init__(self) -> None:
        Backend.open += 1

    def close(self) -> None:
        Backend.open -= 1


def test_gpu_and_driver_have_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch)
    monkeypatch.setattr(tensorrt_library, "load_library", lambda library: sys.modules["tensorrt"])
    monkeypatch.setattr(engine, "_cuda_major", lambda library: 13)
    monkeypatch.setattr(device, "missing_package", lambda: "")
    monkeypatch.setattr(device, "Device", Backend)
    cases = (
        (TRT_RTX, HOPPER, False, "compute capability is 9.0, .*use --engine trt$"),
        (TRT, HOPPER, True, r"runs on the NVIDIA H100 \(9.0\)$"),
        (TRT, Gpu("old", "7.0", (13, 0)), False, "7.5 and later; use --engine trt-rtx"),
        (TRT_RTX, Gpu("x", "8.6", (12, 4)), False, "needs CUDA 13: .*pip install tensorrt-rtx-cu12 'cuda-python<13'$"),
        (TRT, Gpu("x", "8.6", (11, 8)), False, "CUDA 11.8, .* needs CUDA 13: update the driver to R580 or later$"),
        (TRT_RTX, ADA, True, "runs on the NVIDIA RTX 4090"),
    )
    for engine_, card, available, pattern in cases:
        monkeypatch.setattr(engine, "find_gpu", lambda card=card: card)
        answer = engine_.probe(run=True)
        assert answer.available is available, answer
        assert re.search(pattern, answer.reason), answer.reason
    assert Backend.open == 0, "a stream was not freed"
    monkeypatch.setattr(device, "missing_package", lambda: "device memory needs the package cuda-python")
    assert "cuda-python" in TRT_RTX.probe(run=True).reason


class Status(enum.IntEnum):
    """cudaError_t, as far as it is needed."""

    cudaSuccess = 0
    cudaErrorInsufficientDriver = 35
    cudaErrorMemoryAllocation = 2


def bindings(monkeypatch: pytest.MonkeyPatch, version: str, status: Status) -> None:
    """cuda-python of a version whose first call answers `status`."""

    def cudaStreamCreateWithFlags(_flags: int) -> tuple[Status, int]:
        return status, 7

    runtime = types.ModuleType("cuda.bindings.runtime")
    vars(runtime).update(
        cudaStreamCreateWithFlags=cudaStreamCreateWithFlags, cudaStreamNonBlocking=1,
        cudaStreamDestroy=lambda stream: (Status.cudaSuccess,),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    monkeypatch.setattr(device.importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(device, "missing_package", lambda: "")


def test_a_driver_too_old_for_the_bindings_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT's packages are for CUDA 12, as the driver is; pip gave the bindings of CUDA 13."""
    stub(monkeypatch)
    monkeypatch.setattr(engine, "_cuda_major", lambda library: 12)
    monkeypatch.setattr(engine, "find_gpu", lambda: Gpu("NVIDIA L4", "8.9", (12, 8)))
    bindings(monkeypatch, "13.5.0", Status.cudaErrorInsufficientDriver)
    answer = TRT.probe(run=True)
    assert not answer.available
    assert re.search(
        "cudaErrorInsufficientDriver .*supports CUDA 12.8, .*cuda-python 13.5.0 needs CUDA 13: .*'cuda-python<13'",
        answer.reason,
    )
    bindings(monkeypatch, "12.9.9", Status.cudaErrorMemoryAllocation)
    answer = TRT.probe(run=True)
    assert not answer.available
    assert answer.reason.endswith("cudaErrorMemoryAllocation")
    bindings(monkeypatch, "12.9.9", Status.cudaSuccess)
    assert TRT.probe(run=True).available, TRT.probe(run=True).reason


def test_packages_fit_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named for the CUDA that the driver supports."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n.startswith(("tensorrt", "cuda")) else real(n, *a)
    )
    for cuda, rtx, memory in (
        ((13, 1), "pip install tensorrt-rtx cuda-python", "pip install cuda-python"),
        ((12, 8), "pip install tensorrt-rtx-cu12 'cuda-python<13'", "pip install 'cuda-python<13'"),
    ):
        card = Gpu("NVIDIA L4", "8.9", cuda)
        for module in (tensorrt_library, device):
            monkeypatch.setattr(module, "find_gpu", lambda card=card: card)
        assert TRT_RTX.probe(run=True).reason.endswith(rtx)
        assert memory in device.missing_package()
        assert f"CUDA {cuda[0]}.{cuda[1]}" in describe_gpu(card)
    assert "2 GPUs are visible" in describe_gpu(Gpu("NVIDIA L4", "8.9", (13, 0), 2))


def test_a_jetson_gets_no_advice_for_packages_that_do_not_exist(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """JetPack 6: aarch64 with a driver of CUDA 12.6, and a TensorRT of the system that an environment does not see."""
    real, orin = importlib.util.find_spec, Gpu("Orin", "8.7", (12, 6))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name.startswith("tensorrt") else real(name, *a)
    )
    monkeypatch.setattr(gpu.platform, "machine", lambda: "aarch64")
    for module in (tensorrt_library, engine):
        monkeypatch.setattr(module, "find_gpu", lambda: orin)
    monkeypatch.setattr(tensorrt_library, "_SYSTEM", tmp_path)
    said = TRT.probe(run=True).reason
    assert "install JetPack 7.2" in said and "cu12" not in said
    (tmp_path / "python3.12" / "dist-packages" / "tensorrt").mkdir(parents=True)
    assert f"--system-site-packages to see that in {tmp_path}/python3.12/dist-packages" in TRT.probe(run=True).reason
    stub(monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", real)
    monkeypatch.setattr(engine, "_cuda_major", lambda library: 13)
    assert re.search("update the driver .*JetPack 7.2", TRT.probe(run=True).reason)
    thor = Gpu("Thor", "11.0", (13, 0))
    for module in (tensorrt_library, engine):
        monkeypatch.setattr(module, "find_gpu", lambda: thor)
    for version, refused in (("11.4.0.106", True), ("11.0.0", True), ("11.4.1", False), ("10.16.1.11", False)):
        monkeypatch.setattr(sys.modules["tensorrt"], "__version__", version)
        said = f"tensorrt {version} is not for the Thor, a Jetson: pip install 'tensorrt>=10.16,<11' cuda-python"
        assert (said in TRT.probe(run=True).reason) is refused, TRT.probe(run=True).reason
    assert PLAIN.runs_on("8.7") and PLAIN.runs_on("11.0") and not RTX.runs_on("8.7") and not RTX.runs_on("11.0")


def test_a_broken_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> types.ModuleType:
        raise FileNotFoundError("libnvinfer.so.11: cannot open shared object file")

    stub(monkeypatch)
    monkeypatch.setattr(engine.importlib, "import_module", broken)
    assert "does not load (libnvinfer.so.11" in TRT.probe().reason


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_where_rtx_is_installed_it_builds() -> None:
    """So that a defect of the probe does not pass for a reason to skip."""
    assert TRT_RTX.probe().available, TRT_RTX.probe().reason


@needs_rtx
def test_rtx_builds_here_once_for_all_probes() -> None:
    engine._build_known_answer.cache_clear()
    answers = [TRT_RTX.probe() for _ in range(3)]
    assert engine._build_known_answer.cache_info().misses == 1
    assert all(f"tensorrt-rtx {load_library(RTX).__version__} builds without a GPU" in a.reason for a in answers)


@needs_rtx
def test_a_library_that_builds_nothing_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    engine._build_known_answer.cache_clear()
    monkeypatch.setattr(load_library(RTX).Builder, "build_serialized_network", lambda *a: None)
    answer = TRT_RTX.probe()
    assert not answer.available
    assert "builds nothing" in answer.reason


class Driver:
    """libcuda with one GPU, or with none."""

    def __init__(self, status: int = 0, count: int = 1) -> None:
        self.cuInit = lambda _flags: status
        self._count = count

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = self._count
        return 0

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = 12_080
        return 0

    def cuDeviceGet(self, out: Any, index: int) -> int:
        out._obj.value = index
        return 0

    def cuDeviceGetName(self, out: Any, _size: int, _device: int) -> int:
        out.value = b"NVIDIA L4"
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: int, _device: int) -> int:
        out._obj.value = {75: 8, 76: 9, 16: 58, 36: 6_251_000, 37: 192}[attribute]
        return 0

    def cuDeviceTotalMem_v2(self, out: Any, _device: int) -> int:
        out._obj.value = 24 << 30
        return 0

    def cuDeviceGetPCIBusId(self, out: Any, _size: int, _device: int) -> int:
        out.value = b"0000:65:00.0"
        return 0

    held = 0

    def cuDevicePrimaryCtxRetain(self, out: Any, _device: int) -> int:
        out._obj.value = 4711
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:
        self.held += 1
        return int(context.value != 4711)

    def cuCtxPopCurrent_v2(self, _out: Any) -> int:
        self.held -= 1
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = 20 << 30, 24 << 30
        return int(self.held != 1)  # no context: CUDA_ERROR_INVALID_CONTEXT


def test_results_name_the_gpu_and_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(gpu.ctypes, "CDLL", lambda _name: driver)
    assert gpu.describe() == {
        "name": "NVIDIA L4", "compute": "8.9", "cuda": "12.8",
        "memory_bytes_per_second": 300_048_000_000, "memory_bytes": 24 << 30,
    }  # fmt: skip
    assert gpu.free_bytes() == 20 << 30 and gpu.bus_id() == "0000:65:00.0"
    assert driver.held == 0, "the context is left"
    driver.cuMemGetInfo_v2 = lambda *_: 201  # type: ignore[method-assign]
    assert gpu.free_bytes() is None
    assert driver.held == 0
    monkeypatch.setattr(gpu.ctypes, "CDLL", lambda _name: Driver(status=100))
    assert gpu.describe() is None and gpu.free_bytes() is None and gpu.bus_id() == ""


def test_the_driver_is_asked_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(driver: Driver | None) -> Gpu | str:
        def load(name: str) -> Driver:
            if driver is None:
                raise OSError(f"{name}: cannot open shared object file")
            return driver

        monkeypatch.setattr(gpu.ctypes, "CDLL", load)
        return find_gpu()

    assert answer(Driver()) == Gpu("NVIDIA L4", "8.9", (12, 8))
    assert answer(Driver(count=2)) == Gpu("NVIDIA L4", "8.9", (12, 8), 2)
    assert "no NVIDIA driver" in str(answer(None))
    assert "finds no GPU" in str(answer(Driver(status=100)))
    assert "finds no GPU" in str(answer(Driver(count=0)))
    assert "cuInit answers 803" in str(answer(Driver(status=803)))
    broken = Driver()
    broken.cuDeviceGetAttribute = lambda *a: 1  # type: ignore[method-assign]
    assert "cuDeviceGetAttribute answers 1" in str(answer(broken))
