"""TensorRT without a GPU: what the real parser and builder of TensorRT-RTX take, the runner on a fake, refusals."""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import errno
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import re
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.decoders import static
from nbl_export.engines import device, engine_record, gpu, tensorrt, trt_build, trt_log, trt_network, trt_runner
from nbl_export.engines.engine_record import EngineRecord, read_record
from nbl_export.engines.gpu import Gpu, find_gpu
from nbl_export.engines.schedule import engine_profiles
from nbl_export.engines.static_decoder import open_decoder
from nbl_export.engines.static_host import StaticDecoder, StaticRunner
from nbl_export.engines.tensorrt import LIBRARIES, TRT, TRT_RTX, load_library
from nbl_export.engines.trt_build import BuildSettings, build_engine
from nbl_export.engines.trt_log import Message, messages_of
from nbl_export.engines.trt_network import ParsedNetwork, parse, refuse_without_kernel_for
from nbl_export.engines.trt_runner import TrtSession, refuse_misfit
from nbl_export.errors import CorruptError, NblError
from nbl_export.int4_blocks import int4_blocks
from nbl_export.records import Plan
from nbl_export.rewrite import rewrite_model
from nbl_export.rewrite.quantize_blocks import QuantizeMapBlocks
from nbl_export.rewrite.renumber import RenumberCaches

from .fake_tensorrt import FakeDevice, FakeTensorRT
from .static_tiny import (
    ARCHITECTURES,
    HEAD,
    LAYERS,
    SLOTS,
    SPEC,
    TOLERANCE,
    maps_of,
    rows,
    save_checkpoint,
    torch_logits,
    worst,
)

RTX, PLAIN = LIBRARIES["trt-rtx"], LIBRARIES["trt"]
_PROBE = TRT_RTX.probe()
needs_rtx = pytest.mark.skipif(not _PROBE.available, reason=_PROBE.reason)
SMALL = BuildSettings(max_batch=2, prefill_chunk=16)
ADA = Gpu("NVIDIA RTX 4090", "8.9", (13, 0))
HOPPER = Gpu("NVIDIA H100", "9.0", (13, 0))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """architecture -> checkpoint"""
    return functools.cache(lambda name: save_checkpoint(name, tmp_path_factory.mktemp(f"trt-{name}")))


@pytest.fixture(scope="session")
def graph(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(architecture, replaced layers, precision, slots) -> directory with decoder.onnx"""

    @functools.cache
    def make(architecture: str, replaced: tuple[int, ...] = (), precision: str = "fp16", slots: int = SLOTS) -> Path:
        model = static.build_form(tiny(architecture), slots)
        static.finish(model, precision, "last")
        rewrite_model(model, Plan(LAYERS, replaced), maps_of(replaced))
        for step in (QuantizeMapBlocks(), RenumberCaches()):
            step(model)
        out = tmp_path_factory.mktemp(f"{architecture}-{precision}-{slots}") / "model"
        static.save_graph(model, out)
        (out / "config.json").write_text("{}", encoding="utf-8")
        return out

    return make


@pytest.fixture(scope="session")
def engine(graph: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real fp16 engine of the Llama without its middle layer's attention. Never write to it."""
    out = tmp_path_factory.mktemp("engine") / "model"
    build_engine(RTX, graph("llama", (1,)), out, SMALL)
    return out


def parsed(path: Path) -> ParsedNetwork:
    trt = load_library(RTX)
    return parse(trt, messages_of(trt), path)


# -- what the real parser and builder take --------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int4"])
@pytest.mark.parametrize("replaced", [(), (1,), (0, 2)], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_parser_takes_it_and_reads_every_input(
    architecture: str, replaced: tuple[int, ...], precision: str, graph: Callable[..., Path]
) -> None:
    found = parsed(graph(architecture, replaced, precision) / "decoder.onnx")
    kept = LAYERS - len(replaced)
    assert found.contract.cache_layers == tuple(range(kept))
    assert sum(i.name.startswith("past_key_values.") for i in found.contract.inputs) == 2 * kept
    assert found.precision == precision
    kinds = [layer.type.name for layer in found.layers]
    assert kinds.count("KV_CACHE_UPDATE") == 2 * kept
    assert kinds.count("ATTENTION_INPUT") == kept
    matrices = 7 * LAYERS - 4 * len(replaced) + len(replaced)
    assert kinds.count("DEQUANTIZE") == (matrices if precision == "int4" else 0)


@needs_rtx
def test_a_plan_is_built_with_its_record(engine: Path, graph: Callable[..., Path]) -> None:
    record = read_record(engine)
    assert (engine / "decoder.engine").stat().st_size == record.plan_bytes > 1_000_000
    assert (record.engine, record.version) == ("trt-rtx", load_library(RTX).__version__)
    assert (record.precision, record.max_batch, record.prefill_chunk, record.max_seq_len) == ("fp16", 2, 16, SLOTS)
    assert record.compute_capabilities == ("8.0", "8.6", "8.9", "12.0", "12.1")
    assert record.profiles == engine_profiles(2, 16, SLOTS)
    assert 0 < record.build_seconds < 60
    source = graph("llama", (1,))
    assert record.graph_sha256 == {
        name: engine_record.digest_of(source / name) for name in ("decoder.onnx", "decoder.onnx.data")
    }
    assert sorted(p.name for p in engine.iterdir()) == ["config.json", "decoder.engine", "engine.json"]
    assert [p.name for p in engine.parent.iterdir()] == ["model"]


@needs_rtx
@pytest.mark.parametrize(("precision", "targets"), [("int4", ()), ("bf16", ("8.6",)), ("fp16", ("7.5", "12.0"))])
def test_other_precisions_and_targets_build(
    precision: str, targets: tuple[str, ...], graph: Callable[..., Path], tmp_path: Path
) -> None:
    said: list[str] = []
    settings = dataclasses.replace(SMALL, targets=targets)
    source = graph("mistral-window", (1,), precision)
    record = build_engine(RTX, source, tmp_path / "e", settings, lambda phase, _seconds: said.append(phase))
    assert record.precision == precision
    assert record.compute_capabilities == (targets or RTX.default_targets)
    assert "Building engine" in said


@needs_rtx
@pytest.mark.parametrize("slots", [2048, 32_768])
def test_cache_memory_is_as_predicted(slots: int, graph: Callable[..., Path]) -> None:
    """Bytes of the engine's cache inputs, original against NBL, from the model's numbers alone."""
    for replaced in ((), (1,)):
        contract = parsed(graph("llama", replaced, "fp16", slots) / "decoder.onnx").contract
        caches = [i for i in contract.inputs if i.name.startswith("past_key_values.")]
        assert all(i.shape[2] == slots for i in caches)
        stated = sum(int(np.prod([int(n) for n in i.shape[1:]])) * 2 for i in caches)
        assert stated == SPEC.cache_bytes_per_token(LAYERS - len(replaced), 2) * slots
        assert contract.cache_bytes_per_token(HEAD) * slots == stated


@needs_rtx
def test_the_record_has_those_bytes(engine: Path) -> None:
    record = read_record(engine)
    assert record.cache_bytes_per_token == SPEC.cache_bytes_per_token(2, 2)
    assert record.cache_bytes == record.cache_bytes_per_token * SLOTS * 2
    assert record.contract.cache_bytes_per_token(HEAD) == record.cache_bytes_per_token


@needs_rtx
def test_a_long_cache_builds(graph: Callable[..., Path], tmp_path: Path) -> None:
    """Decode of exactly one token has no kernel at this length; the profile rule avoids it."""
    record = build_engine(RTX, graph("llama", (1,), "fp16", 32_768), tmp_path / "e", BuildSettings(1, 16))
    assert record.profiles[1].tokens == (1, 1, 2)


# -- faults that TensorRT would pass over in silence ---------------------------------------------------------


def with_ignored_input(source: Path, out: Path) -> Path:
    """The graph with nonpad_kv_seqlen, which the parser drops without a word."""
    model = ir.load(source / "decoder.onnx")
    extra = ir.Value(name="nonpad_kv_seqlen", shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.append(extra)
    for node in model.graph:
        if node.op_type == "Attention":
            node.resize_inputs(7)
            node.replace_input_with(6, extra)
    static.save_graph(model, out)
    return out


@needs_rtx
def test_an_ignored_input_stops_the_build(
    graph: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = with_ignored_input(graph("llama"), tmp_path / "source")
    with pytest.raises(NblError, match="parser ignores the input nonpad_kv_seqlen"):
        build_engine(RTX, source, tmp_path / "e", SMALL)
    monkeypatch.setattr(trt_network, "_unread_inputs", lambda _: [])
    with pytest.raises(NblError, match=r"would not read an input .* nonpad_kv_seqlen"):
        build_engine(RTX, source, tmp_path / "e", SMALL)
    assert not (tmp_path / "e").exists()


def test_known_noise_and_everything_else() -> None:
    noise = [
        Message("WARNING", "ModelImporter.cpp:1071: Make sure input input_ids has Int64 binding."),
        Message("ERROR", "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (cudaError 35)"),
        Message("INFO", "anything"),
    ]
    assert trt_log.complaints(noise) == []
    wrong = Message("WARNING", "Unused Input:\n nonpad_kv_seqlen")
    assert trt_log.complaints([*noise, wrong]) == ["Unused Input: nonpad_kv_seqlen"]
    assert trt_log.ignored_inputs([*noise, wrong, Message("WARNING", "slow")]) == ["Unused Input: nonpad_kv_seqlen"]


@needs_rtx
def test_a_warning_of_the_parser_stops_the_build(
    graph: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_log, "_NOISE", ())
    with pytest.raises(NblError, match=r"parser warns about .* Int64 binding"):
        build_engine(RTX, graph("llama"), tmp_path / "e", SMALL)


# -- refusals of the build -----------------------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 8}, "heads of size 8: .* multiples of 8 from 16 to 256"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1}, "2 query heads, 4 at least"),
    ],
)
def test_attention_without_a_kernel_is_named_before_the_build(
    changes: dict[str, int], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    static.build(save_checkpoint("llama", tmp_path / "c", **changes), tmp_path / "g", "fp16", max_seq_len=32)
    with pytest.raises(NblError, match=reason):
        build_engine(RTX, tmp_path / "g", tmp_path / "e", BuildSettings(1, 16))
    monkeypatch.setattr(trt_build, "refuse_without_kernel", lambda _: None)
    with pytest.raises(NblError, match="does not build"):  # the rule is the library's own
        build_engine(RTX, tmp_path / "g", tmp_path / "e", BuildSettings(1, 16))


def test_kernels_are_known_without_a_graph() -> None:
    refuse_without_kernel_for(9, 64, "fp16")
    for heads, size, precision, reason in (
        (9, 64, "fp32", "fp32"), (9, 20, "fp16", "size 20"), (9, 264, "bf16", "size 264"), (3, 64, "fp16", "3 query"),
    ):  # fmt: skip
        with pytest.raises(NblError, match=reason):
            refuse_without_kernel_for(heads, size, precision)


@needs_rtx
@pytest.mark.parametrize(
    ("settings", "precision", "reason"),
    [
        (BuildSettings(1, SLOTS + 1), "fp16", "--prefill-chunk 97"),
        (BuildSettings(0, 8), "fp16", "--max-batch 0"),
        (BuildSettings(1, 8, ("9.0",)), "fp16", "compute capability 9.0, .* --engine trt$"),
        (BuildSettings(1, 8, ("7.5",)), "int4", "7.5 has no int4"),
        (BuildSettings(1, 8), "fp32", "no fused attention kernel for fp32"),
    ],
)
def test_settings_that_cannot_be_built_are_refused(
    settings: BuildSettings, precision: str, reason: str, graph: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(NblError, match=reason):
        build_engine(RTX, graph("llama", (), precision), tmp_path / "e", settings)
    assert list(tmp_path.iterdir()) == []


def missing(directory: Path) -> None:
    (directory / "decoder.onnx").unlink()


def text(directory: Path) -> None:
    (directory / "decoder.onnx").write_text("not a model", encoding="utf-8")


def empty(directory: Path) -> None:
    (directory / "decoder.onnx").write_bytes(b"")


def no_data(directory: Path) -> None:
    (directory / "decoder.onnx.data").unlink()


def cut_data(directory: Path) -> None:
    path = directory / "decoder.onnx.data"
    path.write_bytes(path.read_bytes()[:1000])


@needs_rtx
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (missing, "holds no decoder.onnx"),
        (text, "refuses"),
        (empty, "not an ONNX model"),
        (no_data, "refuses"),
        (cut_data, "refuses"),
    ],
)
def test_a_damaged_graph_is_refused(
    damage: Callable[[Path], None], reason: str, graph: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in graph("llama").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    damage(source)
    with pytest.raises(NblError, match=reason) as caught:
        build_engine(RTX, source, tmp_path / "e", SMALL)
    assert str(source) in str(caught.value)
    assert not (tmp_path / "e").exists()


@needs_rtx
def test_an_interrupted_build_leaves_what_was_there(graph: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "engine" / "model"
    out.mkdir(parents=True)
    (out / "mine").write_text("old")

    def stop(_phase: str, _seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(RTX, graph("llama", (1,)), out, SMALL, stop)
    assert [p.name for p in out.parent.iterdir()] == ["model"]
    assert [p.name for p in out.iterdir()] == ["mine"]


@needs_rtx
def test_a_full_disk_leaves_nothing_half_written(
    graph: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_path: Path, _value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trt_build, "write_json", full)
    with pytest.raises(NblError, match="no space left"):
        build_engine(RTX, graph("llama", (1,)), tmp_path / "engine" / "model", SMALL)
    assert list((tmp_path / "engine").iterdir()) == []


# -- probes --------------------------------------------------------------------------------------------------


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name.startswith("tensorrt") else real(name, *a)
    )
    started = time.perf_counter()
    for engine_, package, more in (
        (TRT, "tensorrt", "pypi.nvidia.com"),
        (TRT_RTX, "tensorrt-rtx", "pip install tensorrt-rtx"),
    ):
        for answer in (engine_.probe(), engine_.probe_run()):
            assert not answer.available
            assert f"the package {package} is not installed" in answer.reason
            assert more in answer.reason
    assert "--engine trt-rtx builds without a GPU" in TRT.probe().reason
    assert time.perf_counter() - started < 2


def stub(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A `tensorrt` that can be imported and nothing else."""
    module = types.ModuleType("tensorrt")
    module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    module.__version__ = "11.4.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def test_tensorrt_without_a_gpu_is_refused_before_its_library_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch)
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: "no NVIDIA driver is installed (libcuda is not found)")
    for answer in (TRT.probe(), TRT.probe_run()):
        assert not answer.available
        assert "no NVIDIA driver is installed" in answer.reason
    assert "--engine trt-rtx builds without a GPU" in TRT.probe().reason


def test_tensorrt_is_exercised_up_to_its_first_call(
    monkeypatch: pytest.MonkeyPatch, graph: Callable[..., Path], tmp_path: Path
) -> None:
    module = stub(monkeypatch)
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: HOPPER)
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
    with pytest.raises(TypeError, match="nullptr"):
        build_engine(PLAIN, graph("llama"), tmp_path / "e", SMALL)
    assert len(calls) == 2
    assert isinstance(calls[0], module.ILogger)


def test_gpu_and_driver_have_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch)
    monkeypatch.setattr(tensorrt, "load_library", lambda library: sys.modules["tensorrt"])
    monkeypatch.setattr(tensorrt, "_cuda_major", lambda library: 13)
    monkeypatch.setattr(device, "find_backend", lambda: device.CudaPython)
    cases = (
        (TRT_RTX, HOPPER, False, "compute capability is 9.0, .* 7.5, 8.0, 8.6, 8.9, 12.0, 12.1; use --engine trt$"),
        (TRT, HOPPER, True, r"runs on the NVIDIA H100 \(9.0\), memory by cuda-python"),
        (TRT, Gpu("old", "7.0", (13, 0)), False, "7.5 and later; use --engine trt-rtx"),
        (
            TRT_RTX,
            Gpu("x", "8.6", (12, 4)),
            False,
            "CUDA 12.4, .* needs CUDA 13: .* R580 .* tensorrt-rtx-cu12",
        ),
        (TRT_RTX, ADA, True, "runs on the NVIDIA RTX 4090"),
    )
    for engine_, card, available, pattern in cases:
        monkeypatch.setattr(tensorrt, "find_gpu", lambda card=card: card)
        answer = engine_.probe_run()
        assert answer.available is available, answer
        assert re.search(pattern, answer.reason), answer.reason
    monkeypatch.setattr(device, "find_backend", lambda: "device memory needs the package cuda-python")
    assert "cuda-python" in TRT_RTX.probe_run().reason


def test_a_broken_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> types.ModuleType:
        raise FileNotFoundError("libnvinfer.so.11: cannot open shared object file")

    stub(monkeypatch)
    monkeypatch.setattr(tensorrt.importlib, "import_module", broken)
    assert "does not load (libnvinfer.so.11" in TRT.probe().reason


@needs_rtx
def test_rtx_builds_here_in_under_two_seconds() -> None:
    tensorrt._build_known_answer.cache_clear()
    started = time.perf_counter()
    answer = TRT_RTX.probe()
    assert time.perf_counter() - started < 2
    assert f"tensorrt-rtx {load_library(RTX).__version__} builds without a GPU" in answer.reason


@needs_rtx
def test_a_library_that_builds_nothing_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt._build_known_answer.cache_clear()
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
        out._obj.value = {75: 8, 76: 9}[attribute]
        return 0


def test_the_driver_is_asked_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(driver: Driver | None) -> Gpu | str:
        def load(name: str) -> Driver:
            if driver is None:
                raise OSError(f"{name}: cannot open shared object file")
            return driver

        monkeypatch.setattr(gpu.ctypes, "CDLL", load)
        return find_gpu()

    assert answer(Driver()) == Gpu("NVIDIA L4", "8.9", (12, 8))
    assert "no NVIDIA driver" in str(answer(None))
    assert "finds no GPU" in str(answer(Driver(status=100)))
    assert "finds no GPU" in str(answer(Driver(count=0)))
    assert "cuInit answers 803" in str(answer(Driver(status=803)))
    broken = Driver()
    broken.cuDeviceGetAttribute = lambda *a: 1  # type: ignore[method-assign]
    assert "cuDeviceGetAttribute answers 1" in str(answer(broken))


# -- plans that do not fit -----------------------------------------------------------------------------------


def fake_record(graph_: Path, directory: Path, **changes: Any) -> EngineRecord:
    """An engine directory for the fake: the plan is the path of a graph."""
    decoder = open_decoder(graph_)
    plan = directory / "decoder.engine"
    plan.write_bytes(str(graph_).encode())
    layers = decoder.contract.cache_layers
    values: dict[str, Any] = {
        "engine": "trt", "version": FakeTensorRT.__version__, "precision": "fp32", "compute_capabilities": ("8.9",),
        "max_batch": 2, "prefill_chunk": 8, "max_seq_len": decoder.slots,
        "profiles": engine_profiles(2, 8, decoder.slots),
        "inputs": decoder.contract.inputs, "outputs": decoder.contract.outputs, "cache_layers": len(layers),
        "cache_bytes_per_token": 0, "cache_bytes": 0, "parse_seconds": 0.0, "build_seconds": 0.0,
        "plan_bytes": plan.stat().st_size, "plan_sha256": engine_record.digest_of(plan), "graph_sha256": {},
    }  # fmt: skip
    record = EngineRecord(**{**values, **changes})
    (directory / "engine.json").write_text(json.dumps(record.to_json()), encoding="utf-8")
    return record


def test_a_record_comes_back_as_it_was(graph: Callable[..., Path], tmp_path: Path) -> None:
    record = fake_record(graph("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    assert read_record(tmp_path) == record
    assert record.contract.cache_layers == (0, 1)


def cut_plan(directory: Path) -> None:
    path = directory / "decoder.engine"
    path.write_bytes(path.read_bytes()[:-1])


def swap_plan(directory: Path) -> None:
    path = directory / "decoder.engine"
    path.write_bytes(path.read_bytes()[::-1])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_plan, "decoder.engine is cut short or replaced: .* nbl-export build DIR --engine trt"),
        (swap_plan, "decoder.engine is damaged: .* nbl-export build DIR --engine trt"),
        (lambda d: (d / "decoder.engine").unlink(), "decoder.engine is missing"),
        (lambda d: (d / "engine.json").write_text("{"), "engine.json cannot be read"),
        (lambda d: (d / "engine.json").write_text('{"schema": 9}'), "another schema"),
        (lambda d: (d / "engine.json").unlink(), "holds no engine: .* nbl-export build"),
    ],
)
def test_a_damaged_engine_is_refused(
    damage: Callable[[Path], object], reason: str, graph: Callable[..., Path], tmp_path: Path
) -> None:
    fake_record(graph("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    damage(tmp_path)
    with pytest.raises(NblError, match=reason) as caught:
        read_record(tmp_path)
    assert isinstance(caught.value, CorruptError) or "holds no engine" in str(caught.value)


def test_a_plan_for_something_else_is_refused_with_both_named(graph: Callable[..., Path], tmp_path: Path) -> None:
    record = fake_record(graph("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    refuse_misfit(PLAIN, record, "1.2.3", ADA, tmp_path)
    again = "nbl-export build DIR --engine trt"
    for library, version, card, pattern in (
        (PLAIN, "1.2.4", ADA, rf"built by tensorrt 1.2.3, and 1.2.4 is installed.*{again}.*tensorrt==1.2.3"),
        (PLAIN, "1.2.3", HOPPER, rf"built for compute capability 8.9, and the NVIDIA H100 has 9.0; .*{again}"),
        (PLAIN, "1.2.3", "no NVIDIA driver is installed", "cannot run here: no NVIDIA driver"),
        (RTX, "1.2.3", ADA, "an engine of trt, not of trt-rtx"),
    ):
        with pytest.raises(NblError, match=pattern):
            refuse_misfit(library, record, version, card, tmp_path)
    rtx = dataclasses.replace(record, engine="trt-rtx")
    with pytest.raises(NblError, match=r"does not run on the NVIDIA H100.*9\.0; use --engine trt$"):
        refuse_misfit(RTX, rtx, "1.2.3", HOPPER, tmp_path)


@needs_rtx
def test_the_real_library_refuses_a_plan_without_a_gpu(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the first call that needs a GPU: with one pretended, the library itself says no."""
    if not isinstance(find_gpu(), str):
        pytest.skip("this machine has a GPU")
    with pytest.raises(NblError, match="cannot run here: no NVIDIA driver"):
        trt_runner.open_session(RTX, engine)
    monkeypatch.setattr(trt_runner, "find_gpu", lambda: ADA)
    monkeypatch.setattr(trt_runner, "open_device", FakeDevice)
    with pytest.raises(NblError, match=r"TensorRT for RTX does not load .*decoder.engine.*nbl-export build"):
        trt_runner.open_session(RTX, engine)


# -- the runner on a fake that executes the same graph --------------------------------------------------------


def fake_session(
    graph_: Path, directory: Path, library: tensorrt.Library = PLAIN, *, captures: bool = True, **changes: Any
) -> tuple[TrtSession, FakeTensorRT]:
    card = FakeDevice(captures=captures)
    record = fake_record(graph_, directory, **changes)
    trt = FakeTensorRT(card, record.profiles)
    return TrtSession(library, directory, record, trt, card), trt


@pytest.mark.parametrize("library", [PLAIN, RTX], ids=["trt", "trt-rtx"])
@pytest.mark.parametrize("architecture", ["llama", "mistral-window"])
def test_the_runner_computes_what_torch_does(
    architecture: str,
    library: tensorrt.Library,
    graph: Callable[..., Path],
    tiny: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Two rows of different length in chunks, then decode steps from the captured graph, to the last slot."""
    session, trt = fake_session(graph(architecture, (1,), "fp32") / "decoder.onnx", tmp_path, library)
    decoder = StaticDecoder(session)
    expected = torch_logits(tiny(architecture), maps_of([1]))
    for _ in range(2):  # begin forgets
        decoder.begin(2)
        ids, valid = np.array([row[:21] for row in rows()]), np.ones((2, 21), int)
        valid[1, 12:] = 0
        got = decoder.step(ids, valid)[:, 0]
        assert worst(got, np.stack([expected[0][20], expected[1][11]])) < TOLERANCE["fp32"]
        for k in range(SLOTS - 21):
            got = decoder.step(np.array([[rows()[0][21 + k]], [rows()[1][12 + k]]]))[:, 0]
            assert worst(got, np.stack([expected[0][21 + k], expected[1][12 + k]])) < TOLERANCE["fp32"]
    with pytest.raises(NblError, match="do not fit"):
        decoder.step(np.ones((2, 1), int))
    prefill, decode = trt.contexts
    assert [context.profile for context in trt.contexts] == [0, 1]
    assert set(prefill.runs) == {(2, 8), (2, 5)}
    assert set(decode.runs) == {(2, 1)}
    assert decode.graphs_by_itself is library.runtime_graphs
    assert not prefill.graphs_by_itself
    assert trt.device.captured == (0 if library.runtime_graphs else 1)
    assert trt.device.replayed == (0 if library.runtime_graphs else len(decode.runs) - 1)
    assert session.cache_bytes == 2 * SPEC.cache_bytes_per_token(2, 4) * SLOTS
    session.close()
    assert trt.device.closed


def test_a_step_that_cannot_be_captured_runs_plainly(graph: Callable[..., Path], tmp_path: Path) -> None:
    session, trt = fake_session(graph("llama", (1,), "fp32") / "decoder.onnx", tmp_path, captures=False)
    runner = StaticRunner(session, tmp_path)
    plain = StaticRunner(open_decoder(graph("llama", (1,), "fp32") / "decoder.onnx", 8).session, tmp_path)
    assert runner.greedy(rows()[0][:11], 12) == plain.greedy(rows()[0][:11], 12)
    assert (trt.device.captured, len(trt.contexts[1].runs)) == (0, 11)


def test_a_changed_batch_is_bound_and_captured_again(graph: Callable[..., Path], tmp_path: Path) -> None:
    session, trt = fake_session(graph("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    decoder = StaticDecoder(session)
    for batch in (1, 2, 1):
        decoder.begin(batch)
        one = [decoder.step(np.array([row[:3]] * batch)) for row in rows()[:1]]
        steps = [decoder.step(np.array([[rows()[0][3 + k]]] * batch)) for k in range(3)]
        same = open_decoder(graph("llama", (1,), "fp32") / "decoder.onnx", 8)
        same.begin(1)
        assert worst(one[0][0], same.step(np.array([rows()[0][:3]]))[0]) < TOLERANCE["fp32"]
        for k, step in enumerate(steps):
            assert worst(step[-1], same.step(np.array([[rows()[0][3 + k]]]))[0]) < TOLERANCE["fp32"]
        assert session.cache_bytes == batch * SPEC.cache_bytes_per_token(2, 4) * SLOTS
    assert trt.device.captured == 3
    with pytest.raises(NblError, match=r"not built for 3 rows .* --max-batch"):
        decoder.begin(3)


def test_half_precision_logits_come_back_wide(graph: Callable[..., Path], tmp_path: Path) -> None:
    session, _ = fake_session(graph("llama", (1,), "fp16") / "decoder.onnx", tmp_path)
    wide = open_decoder(graph("llama", (1,), "fp32") / "decoder.onnx", 8)
    decoder = StaticDecoder(session)
    for each in (decoder, wide):
        each.begin(1)
    ids = np.array([rows()[0][:11]])
    assert 0 < worst(decoder.step(ids), wide.step(ids)) < TOLERANCE["fp16"]


def test_what_the_library_refuses_is_an_error(
    graph: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, trt = fake_session(graph("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    StaticDecoder(session).begin(1)
    monkeypatch.setattr(trt.contexts[0], "execute_async_v3", lambda _stream: False)
    with pytest.raises(NblError, match="TensorRT refuses a step"):
        session.run(np.ones((1, 4), np.int64), [0], [4])
    record = read_record(tmp_path)
    (tmp_path / "decoder.engine").write_bytes(b"nowhere")
    with pytest.raises(NblError, match=r"does not load .*decoder.engine.*nbl-export build"):
        TrtSession(PLAIN, tmp_path, record, trt, FakeDevice())


def test_bfloat16_logits_are_widened() -> None:
    from ml_dtypes import bfloat16

    wanted = np.array([[[1.5, -3.0, 1e30]]], bfloat16)
    half = types.SimpleNamespace(dtype="bfloat16", shape=("batch", 1, 3))
    session = TrtSession.__new__(TrtSession)
    card = FakeDevice()
    address = card.allocate(6)
    ctypes.memmove(address, wanted.ctypes.data, 6)
    session._logits, session._device, session._buffers = half, card, {"logits": address}  # type: ignore[assignment]
    assert np.array_equal(session._download(1, 1), wanted.astype(np.float32))


# -- the API is the installed library's ----------------------------------------------------------------------

# What the variables of each file are, in the library's classes.
CLASSES = {
    trt_network: {"builder": "Builder", "network": "INetworkDefinition", "net": "INetworkDefinition",
                  "parser": "OnnxParser", "e": "ParserError", "layer": "ILayer", "tensor": "ITensor"},
    trt_build: {"builder": "Builder", "network": "INetworkDefinition", "config": "IBuilderConfig", "tensor": "ITensor",
                "result": "IOptimizationProfile"},
    trt_runner: {"runtime": "Runtime", "engine": "ICudaEngine", "context": "IExecutionContext",
                 "config": "IRuntimeConfig"},
    tensorrt: {"builder": "Builder", "network": "INetworkDefinition"},
    trt_log: {},
}  # fmt: skip


def uses(module: types.ModuleType, names: dict[str, str]) -> list[tuple[str, str, int | None]]:
    """(class, attribute, number of arguments or None) wherever a known variable's attribute is read or called."""
    tree = ast.parse(inspect.getsource(module))
    plain = (
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and not any(isinstance(a, ast.Starred) for a in n.args)
    )
    calls = {id(node.func): len(node.args) for node in plain}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            found.append((names[node.value.id], node.attr, calls.get(id(node))))
    return found


def signature_takes(doc: str, count: int) -> bool:
    """Whether one of a pybind11 docstring's overloads takes so many arguments beside self."""
    for line in re.findall(r"^\s*(?:\d+\. )?\w+\(self[^)]*?(.*)\) ->", doc, re.M):
        parts = [p for p in re.sub(r"\[[^\]]*\]|\([^)]*\)|<[^>]*>", "", line).split(",")[1:] if p.strip()]
        if sum("=" not in p for p in parts) <= count <= len(parts):
            return True
    return False


@needs_rtx
@pytest.mark.parametrize("module", CLASSES, ids=lambda m: m.__name__.rsplit(".", 1)[1])
def test_every_name_is_in_the_installed_library(module: types.ModuleType) -> None:
    trt = load_library(RTX)
    seen = uses(module, CLASSES[module])
    assert {name for name, _, _ in seen} == set(CLASSES[module].values())
    for name, attribute, arguments in seen:
        member = getattr(getattr(trt, name), attribute)
        if arguments is not None and "->" in (member.__doc__ or ""):
            assert signature_takes(member.__doc__, arguments), (name, attribute, arguments, member.__doc__)
    for _, attribute, _ in uses(module, {"trt": ""}):
        assert hasattr(trt, attribute), attribute


def test_int4_uses_all_codes() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    codes, scales = int4_blocks(weight, 32, np.dtype(np.float16))
    assert (codes.shape, scales.shape, scales.dtype) == ((64, 3), (2, 3), np.float16)
    assert codes.astype(int).min() == -8 and codes.astype(int).max() <= 7
    assert np.all(int4_blocks(np.zeros((32, 1), np.float32), 32, np.dtype(np.float16))[1] == 1)
