"""A GPU stack for `accept` without a GPU: the run's own graphs on ONNX Runtime, and faults planted in it.

    StandIn (acceptance.parts.Parts) ── Library ── Engine ── Context      runs the graph that a plan names
        │                                                                 (a plan is JSON: graph and profiles)
        ├── CountingDevice    host memory behind addresses; a stream with a clock of its own
        └── fault             changes one thing in the runner, the library, the device or the graph

A clock counts simulated seconds: work on the stream takes time, and only waiting for the stream lets the host see it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import functools
import json
import os
import shutil
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from nbl_export.acceptance.parts import Parts
from nbl_export.engines.base import BuildSettings
from nbl_export.engines.gpu import Gpu
from nbl_export.engines.static.schedule import Profile, engine_profiles
from nbl_export.engines.tensorrt.contexts import Strategy
from nbl_export.engines.tensorrt.record import EngineRecord, digest_of, read_record
from nbl_export.engines.tensorrt.runner import TrtSession
from nbl_export.errors import NblError
from nbl_export.files import file_sha256

from .fake_tensorrt import FakeDevice

__all__ = ["VERSION", "StandIn", "stand_in_run"]

VERSION = "1.2.3"
_CARD = Gpu("stand-in", "8.9", (13, 0))
_NUMPY = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}
_NVIDIA = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64"}
_STEP_SECONDS, _COPY_SECONDS = 1e-3, 1e-5


def named(name: str) -> Any:
    """A member of an enum of the library."""
    return types.SimpleNamespace(name=name)


# -- the device ------------------------------------------------------------------------------------------------


class CountingDevice(FakeDevice):
    """The host's memory, and simulated seconds of host and stream."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.host = self.stream_done = 0.0

    def work(self, seconds: float) -> None:
        self.host += 1e-6
        self.stream_done = max(self.stream_done, self.host) + seconds

    def upload(self, address: int, array: np.ndarray) -> None:
        self.work(_COPY_SECONDS)
        if self.fault != "memory":
            super().upload(address, array)

    def download(self, address: int, array: np.ndarray) -> None:
        self.work(_COPY_SECONDS)
        super().download(address, array)

    def synchronize(self) -> None:
        self.host = max(self.host, self.stream_done)

    def submit(self, work: Callable[[], None]) -> None:
        self.work(_STEP_SECONDS)
        super().submit(work)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        replay = super().capture(work)

        def timed() -> None:
            self.work(_STEP_SECONDS)
            replay()

        return timed


@dataclasses.dataclass
class SimulatedTimer:
    device: CountingDevice
    begun: float = 0.0

    def start(self) -> None:
        self.begun = max(self.device.stream_done, self.device.host)

    def stop(self) -> float:
        end = max(self.device.stream_done, self.device.host)
        self.device.synchronize()
        return end - self.begun


# -- the library -----------------------------------------------------------------------------------------------


class Library:
    """Stands in for the module `tensorrt`."""

    __version__ = VERSION

    class ILogger:
        VERBOSE = "VERBOSE"

    class CudaGraphStrategy:
        WHOLE_GRAPH_CAPTURE, DISABLED = "whole graph", "disabled"

    DynamicShapesKernelSpecializationStrategy = enum.Enum(
        "DynamicShapesKernelSpecializationStrategy", "LAZY EAGER NONE"
    )
    ExecutionContextAllocationStrategy = enum.Enum("ExecutionContextAllocationStrategy", "STATIC USER_MANAGED")
    TensorIOMode = types.SimpleNamespace(INPUT="input", OUTPUT="output")
    TensorLocation = types.SimpleNamespace(DEVICE="device", HOST="host")
    LayerInformationFormat = types.SimpleNamespace(JSON="json")

    def __init__(self, parts: StandIn) -> None:
        self.parts = parts

    def Runtime(self, _logger: Any) -> Any:
        return types.SimpleNamespace(deserialize_cuda_engine=lambda plan: Engine(self.parts, json.loads(plan)))


class Engine:
    """`ICudaEngine` of a plan."""

    def __init__(self, parts: StandIn, plan: dict[str, Any]) -> None:
        import onnxruntime as ort

        self.parts, self.graph = parts, Path(plan["graph"])
        self.profiles = [Profile(p["name"], tuple(p["batch"]), tuple(p["tokens"])) for p in plan["profiles"]]
        options = ort.SessionOptions()
        options.log_severity_level = 3  # it warns of each cache that is copied
        self.session = ort.InferenceSession(str(self.graph), options, providers=["CPUExecutionProvider"])
        self.inputs = {a.name: a for a in self.session.get_inputs()}
        self.outputs = {a.name: a for a in self.session.get_outputs()}
        self.dtypes = {name: _NUMPY[a.type] for name, a in {**self.inputs, **self.outputs}.items()}
        self.num_io_tensors = len(self.dtypes)
        self.num_optimization_profiles, self.device_memory_size_v2 = len(self.profiles), 0

    def get_tensor_name(self, index: int) -> str:
        return list(self.dtypes)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_dtype(self, name: str) -> Any:
        return named(_NVIDIA[self.dtypes[name]])

    def get_tensor_location(self, name: str) -> str:
        return "host" if self.parts.fault == "host input" and name == "write_indices" else "device"

    def is_shape_inference_io(self, _name: str) -> bool:
        return False

    def get_aliased_input_tensor(self, name: str) -> str:
        return name.replace("present.", "past_key_values.") if name.startswith("present.") else ""

    def create_runtime_config(self) -> Any:
        return types.SimpleNamespace(set_execution_context_allocation_strategy=lambda _strategy: None)

    def create_execution_context(self, config: Any = None) -> Context:
        kernels = getattr(config, "dynamic_shapes_kernel_specialization_strategy", None)
        return Context(self, self.parts.asked[-1] if kernels is None else kernels.name)

    def create_engine_inspector(self) -> Any:
        return types.SimpleNamespace(get_engine_information=lambda _format: json.dumps(self._layers()))

    def _layers(self) -> dict[str, Any]:
        shape = [1, *self.inputs[next(n for n in self.inputs if n.startswith("past"))].shape[1:]]
        cached = {"Name": "present.0.key", "LayerType": "KVCacheUpdate", "Outputs": [{"Dimensions": shape}]}
        fused = {"Name": "attention", "TacticName": "_gemm_mha_v2", "Outputs": [{"Dimensions": [1, 4, 1, 64]}]}
        scaled = {"Name": "scaled keys", "LayerType": "PWN(mul)", "Outputs": [{"Dimensions": shape}]}
        faulty = {"scaled keys": [cached, fused, scaled], "decomposed": ["scores", "softmax"], "no names": []}
        return {"Layers": faulty.get(self.parts.fault, [cached, fused])}


class Context:
    """`IExecutionContext`: what TensorRT refuses is answered with False."""

    def __init__(self, engine: Engine, kernels: str) -> None:
        self.engine, self.profile, self.kernels = engine, engine.profiles[0], kernels
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, index: int, _stream: int) -> bool:
        self.profile = self.engine.profiles[index]
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.dtypes

    def get_tensor_address(self, name: str) -> int:
        return self.addresses.get(name, 0)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        tokens = shape[1] if name == "input_ids" else self.profile.tokens[0]
        return name == "x" or self.profile.takes(shape[0], tokens)

    def execute_async_v3(self, _stream: int) -> bool:
        fault = self.engine.parts.fault
        if fault == "crash":
            os.abort()
        if fault == "raises":
            raise RuntimeError("CUDA error 700: an illegal memory access was encountered")
        shapes = dict(self.shapes)
        self.engine.parts.opened.submit(lambda: self._run(shapes))
        return True

    def _run(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        feeds = {name: self._array(name, shapes[name]) for name in self.engine.inputs}
        found = self.engine.session.run(list(self.engine.outputs), feeds)
        for name, value in zip(self.engine.outputs, found, strict=True):
            self._array(name, value.shape)[...] = self._faulty(name, value, feeds)

    def _faulty(self, name: str, value: np.ndarray, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        fault = self.engine.parts.fault
        if fault == "sum" and name == "y":
            return value + 1
        last = int(feeds["write_indices"].max()) if "write_indices" in feeds else 0
        if fault == "lazy kernels" and name == "logits" and self.kernels == "LAZY":
            return value[..., ::-1]
        if fault == "late decode" and name == "logits" and self.profile.tokens[1] == 1 and last > 70:
            return value[..., ::-1]
        return value

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(self.engine.dtypes[name])
        size = int(np.prod(shape)) * dtype.itemsize
        raw = (ctypes.c_ubyte * size).from_address(self.addresses[name])
        return np.ndarray(shape, dtype, memoryview(raw))


# -- the runner, with faults -----------------------------------------------------------------------------------


class FaultySession(TrtSession):
    """The runner with one fault."""

    fault = ""

    def begin(self, batch: int) -> None:
        if self.fault == "stale cache" and batch == self._batch:
            return
        super().begin(batch)
        if self.fault == "stale cache":
            for address, size in self._caches.values():
                self._device.upload(address, np.full(size, 60, np.uint8))

    def _bind(self, batch: int) -> None:
        step, kept = self._step, dict(vars(self._step))
        super()._bind(batch)
        if self.fault == "stale graph":
            self._step = step
            vars(step).update(kept)
            vars(step)["run"] = functools.partial(_blind, step)
        if self.fault == "lost alias":
            for context in self._contexts:
                for name, (_, size) in self._caches.items():
                    context.set_tensor_address(name.replace("past_key_values", "present"), self._device.allocate(size))

    def run(self, ids_BT: np.ndarray, writes: Any, counts: Any) -> np.ndarray:
        if self.fault == "position":
            writes = [min(w + 1, self.slots - ids_BT.shape[1]) for w in writes]
        if self.fault == "profile" and ids_BT.shape[1] > 1:
            self._contexts.reverse()
        try:
            return super().run(ids_BT, writes, counts)
        finally:
            if self.fault == "profile" and ids_BT.shape[1] > 1:
                self._contexts.reverse()

    def _launch(self, index: int, tokens: int) -> None:
        if self.fault != "swallowed":
            getattr(super(), "_launch")(index, tokens)  # noqa: B009  one of the two is the runner's

    def _execute(self, *arguments: Any) -> None:
        if self.fault != "swallowed":
            getattr(super(), "_execute")(*arguments)  # noqa: B009

    def close(self) -> None:
        super().close()
        if self.fault == "close":
            raise NblError("the GPU refuses cudaFree: cudaErrorInvalidValue")

    def _download(self, batch: int, tokens: int) -> np.ndarray:
        if self.fault != "early clock":
            return super()._download(batch, tokens)
        device = self._device
        assert isinstance(device, CountingDevice)
        before = device.host
        found = super()._download(batch, tokens)
        device.host = before  # as if nobody had waited
        return found


def _blind(step: Any, *arguments: Any) -> None:
    """Run a decode step that does not see that the shape has changed."""
    known = getattr(step, "_shape", None)
    given = (known, *arguments[1:]) if known and len(arguments) > 1 else arguments
    type(step).run(step, *given)


@dataclasses.dataclass(frozen=True)
class StandIn(Parts):
    """The parts for `accept`. `model` is an engine directory whose record is the pattern of new records."""

    model: Path = Path()
    fault: str = ""
    last: list[CountingDevice] = dataclasses.field(default_factory=list)
    loaded: list[Path] = dataclasses.field(default_factory=list)
    asked: list[str] = dataclasses.field(default_factory=lambda: ["EAGER"])

    @property
    def opened(self) -> CountingDevice:
        return self.last[-1]

    def gpu(self) -> Gpu | str:
        return "no NVIDIA driver is installed (libcuda is not found)" if self.fault == "no GPU" else _CARD

    def load(self) -> Any:
        if not _LIBRARIES or _LIBRARIES[-1].parts is not self:
            _LIBRARIES.append(Library(self))
        return _LIBRARIES[-1]

    def memory(self) -> dict[str, Any] | str:
        return {"host memory": self.device}

    def device(self) -> Any:
        self.last.append(CountingDevice(self.fault))
        return self.opened

    def sum_plan(self, _trt: Any) -> bytes:
        place = self.model.parent / "sum.onnx"
        x = ir.val("x", ir.DataType.FLOAT, ["batch", 4])
        node = ir.node("Add", [x, x], outputs=[ir.val("y", ir.DataType.FLOAT, ["batch", 4])])
        graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 21})
        ir.save(ir.Model(graph, ir_version=10), place)
        return plan_of(place, engine_profiles(1, 1, 4))

    def build(self, source: Path, out: Path, settings: BuildSettings) -> EngineRecord:
        from nbl_export.engines.static.on_ort import OrtSession

        out.mkdir()
        if self.fault == "kernel":
            change_attention(source / "decoder.onnx", scale=2.0)
        contract = OrtSession(source / "decoder.onnx").contract
        profiles = engine_profiles(settings.max_batch, settings.prefill_chunk, 4096)
        (out / "decoder.engine").write_bytes(plan_of(source / "decoder.onnx", profiles))
        record = dataclasses.replace(
            read_record(self.model), inputs=contract.inputs, outputs=contract.outputs, profiles=profiles,
            cache_layers=1, plan_bytes=(out / "decoder.engine").stat().st_size,
            plan_sha256=digest_of(out / "decoder.engine"),
        )  # fmt: skip
        (out / "engine.json").write_text(json.dumps(record.to_json()), encoding="utf-8")
        return record

    def deployed(self, directory: Path) -> TrtSession:
        found = self.session(directory, graphs=True)
        used = self.fault != "lost kernels" and directory in self.loaded
        kept = types.SimpleNamespace(ignored="" if used else "there is none yet", save=lambda: None)
        vars(found)["kernels"] = kept
        self.loaded.append(directory)
        return found

    def session(self, directory: Path, *, graphs: bool, kernels: str = "EAGER") -> TrtSession:
        self.asked.append(kernels)
        kind = type("Session", (FaultySession,), {"fault": self.fault})
        record, strategy = read_record(directory), Strategy(graphs=graphs, kernels=kernels)
        found: TrtSession = kind(self.library, directory, record, self.load(), self.device(), strategy)
        return found

    def timer(self, device: Any) -> Any:
        return SimulatedTimer(device)

    def clock(self) -> float:
        return self.opened.host


_LIBRARIES: list[Library] = []


# -- directories -----------------------------------------------------------------------------------------------


def plan_of(graph: Path, profiles: Any) -> bytes:
    return json.dumps({"graph": str(graph), "profiles": [dataclasses.asdict(p) for p in profiles]}).encode()


def change_attention(graph: Path, *, scale: float | None = None, leak: bool = False) -> None:
    """Another scale, or masked slots that are made unlikely instead of impossible."""
    model = ir.load(graph)
    for node in [n for n in model.graph if n.op_type == "Attention"]:
        if scale is not None:
            node.attributes["scale"] = ir.AttrFloat32("scale", scale)
        if leak:
            _soften(model, node)
    ir.save(model, graph)


def _soften(model: ir.Model, node: ir.Node) -> None:
    dtype = node.inputs[0].dtype if node.inputs[0] is not None and node.inputs[0].dtype else ir.DataType.FLOAT16
    names = {}
    for name, value in (("open", 0.0), ("shut", -30.0)):
        tensor = ir.tensor(np.array(value, dtype.numpy()), name=f"{node.name}/{name}")
        names[name] = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(dtype), shape=ir.Shape([]))
        model.graph.register_initializer(names[name])
    bias = ir.node("Where", [node.inputs[3], names["open"], names["shut"]], name=f"{node.name}/bias")
    bias.outputs[0].name = f"{node.name}/bias"
    model.graph.insert_before(node, bias)
    node.replace_input_with(3, bias.outputs[0])


def stand_in_run(compiled: Path, out: Path, engine: str, **dtypes: str) -> Path:
    """A copy of a compiled run for the stand-in: plans name the run's graphs, for either library.

    Args:
        dtypes: wrong types of outputs in engine.json of both engines.
    """
    shutil.copytree(compiled, out)
    manifest = json.loads((out / "nbl.json").read_text(encoding="utf-8"))
    manifest["options"]["engine"] = engine
    for name in ("original", "model"):
        home = out / "engine" / name
        values = json.loads((home / "engine.json").read_text(encoding="utf-8"))
        profiles = [types.SimpleNamespace(**p) for p in values["profiles"]]
        plan = {"graph": str(out / name / "decoder.onnx"), "profiles": [vars(p) for p in profiles]}
        (home / "decoder.engine").write_text(json.dumps(plan), encoding="utf-8")
        size, digest = (home / "decoder.engine").stat().st_size, digest_of(home / "decoder.engine")
        values |= {"engine": engine, "version": VERSION, "compute_capabilities": [_CARD.compute],
                   "plan_bytes": size, "plan_sha256": digest}  # fmt: skip
        for output in values["outputs"]:
            output["dtype"] = dtypes.get(output["name"], output["dtype"])
        (home / "engine.json").write_text(json.dumps(values), encoding="utf-8")
        for file in ("decoder.engine", "engine.json"):
            manifest["stages"]["build"]["files"][f"engine/{name}/{file}"] = file_sha256(home / file)
    (out / "nbl.json").write_text(json.dumps(manifest), encoding="utf-8")
    return out
