"""A GPU stack for `accept` without a GPU: the run's own graphs on ONNX Runtime, and faults planted in it.

    StandIn (acceptance.parts.Parts) ── Library ── Engine ── Context      see `stand_in_library`
        │                                                                 (a plan is JSON: graph and profiles)
        ├── CountingDevice    host memory behind addresses; a stream with a clock of its own
        └── fault             changes one thing in the runner, the library, the device or the graph

The runner and the steps see the library through `tensorrt_api.held`: only names and answers of the real bindings.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from nbl_export.acceptance.parts import Parts
from nbl_export.errors import NblError
from nbl_export.files import file_sha256
from nbl_export.targets.base import BuildSettings
from nbl_export.targets.gpu import Gpu
from nbl_export.targets.tensorrt.contexts import DEFAULT, Strategy
from nbl_export.targets.tensorrt.decode_step import DecodeStep
from nbl_export.targets.tensorrt.kernels import KERNELS_FILE, KernelCache, made_for
from nbl_export.targets.tensorrt.record import EngineRecord, digest_of, read_record
from nbl_export.targets.tensorrt.runner import TrtSession
from nbl_export.targets.tensorrt.static.schedule import engine_profiles
from nbl_export.trust.own_engines import remember

from .stand_in_library import VERSION, CountingDevice, Library, SimulatedTimer
from .tensorrt_api.held import held
from .tensorrt_api.names import RTX_ONLY, TRT_ONLY

__all__ = ["StandIn", "change_attention", "stand_in_run"]

_CARD = Gpu("stand-in", "8.9", (13, 0))


# -- the runner, with faults -----------------------------------------------------------------------------------


class FaultySession(TrtSession):
    """The runner with one fault."""

    fault = ""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.fault == "stale graph":
            self._step.__class__ = StaleStep

    def begin(self, batch: int) -> None:
        if self.fault == "stale cache" and batch == self._batch:
            return
        super().begin(batch)
        if self.fault == "stale cache":
            for address, size in self._caches.values():
                self._device.upload(address, np.full(size, 60, np.uint8))

    def _bind(self, batch: int) -> None:
        super()._bind(batch)
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

    def _execute(self, context: Any, index: int, shape: tuple[int, int]) -> None:
        if self.fault != "swallowed":
            super()._execute(context, index, shape)

    def close(self) -> None:
        if self.fault == "lost kernels":
            self.kernels = None
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


class StaleStep(DecodeStep):
    """Keeps its graph when addresses or shapes change."""

    def reset(self) -> None:
        pass

    def run(self, shape: tuple[int, ...], execute: Callable[[], None]) -> None:
        super().run(self._shape or shape, execute)


# -- the parts ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StandIn(Parts):
    """The parts for `accept`. `model` is an engine directory whose record is the pattern of new records."""

    model: Path = Path()
    fault: str = ""
    last: list[CountingDevice] = dataclasses.field(default_factory=list)

    @property
    def opened(self) -> CountingDevice:
        return self.last[-1]

    def gpu(self) -> Gpu | str:
        return "no NVIDIA driver is installed (libcuda is not found)" if self.fault == "no GPU" else _CARD

    def load(self) -> Any:
        if not _LOADED or _LOADED[-1][0] is not self:
            _LOADED.append((self, held(Library(self), RTX_ONLY if self.library.jit else TRT_ONLY)))
        return _LOADED[-1][1]

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
        from nbl_export.targets.tensorrt.static.on_ort import OrtSession

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
        kernels = KernelCache(directory / KERNELS_FILE, made_for(read_record(directory), _CARD))
        return self._opened(directory, DEFAULT, None if self.fault == "no kernels" else kernels)

    def session(self, directory: Path, *, graphs: bool, kernels: str = "EAGER") -> TrtSession:
        return self._opened(directory, Strategy(graphs=graphs, kernels=kernels), None)

    def _opened(self, directory: Path, strategy: Strategy, kernels: KernelCache | None) -> TrtSession:
        kind: Any = type("Session", (FaultySession,), {"fault": self.fault})
        record, device = read_record(directory), self.device()
        found: TrtSession = kind(self.library, directory, record, self.load(), device, strategy, kernels)
        return found

    def timer(self, device: Any) -> Any:
        return SimulatedTimer(device)

    def clock(self) -> float:
        return self.opened.host


_LOADED: list[tuple[StandIn, Any]] = []


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
        remember(digest)
        for file in ("decoder.engine", "engine.json"):
            manifest["stages"]["build"]["files"][f"engine/{name}/{file}"] = file_sha256(home / file)
    (out / "nbl.json").write_text(json.dumps(manifest), encoding="utf-8")
    return out
