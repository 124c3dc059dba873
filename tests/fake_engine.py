"""An engine directory, a session and an engine for the stand-in of TensorRT."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import NblError
from nbl_export.files import file_sha256
from nbl_export.targets.tensorrt.kernels import KernelCache
from nbl_export.targets.tensorrt.library import Library
from nbl_export.targets.tensorrt.record import EngineRecord
from nbl_export.targets.tensorrt.runner import TrtSession, refuse_misfit
from nbl_export.targets.tensorrt.static.host import StaticRunner
from nbl_export.targets.tensorrt.static.schedule import engine_profiles

from .fake_tensorrt import Context, FakeDevice, FakeTensorRT, FakeTensorRTX
from .static_tiny import open_decoder
from .trt_tiny import ADA, PLAIN

__all__ = ["ChildHere", "Faulty", "StandIn", "fake_record", "fake_session"]


def fake_record(graph_: Path, directory: Path, **changes: Any) -> EngineRecord:
    """An engine directory for the fake: the plan is the path of a graph."""
    decoder = open_decoder(graph_)
    plan = directory / "decoder.engine"
    plan.write_bytes(str(graph_).encode())
    layers = decoder.contract.cache_layers
    values: dict[str, Any] = {
        "engine": "trt", "version": FakeTensorRT.__version__, "precision": "fp32", "attention": "fused",
        "compute_capabilities": ("8.9",), "gpu": "NVIDIA RTX 4090",
        "max_batch": 2, "prefill_chunk": 8, "max_seq_len": decoder.cache_length,
        "profiles": engine_profiles(2, 8, decoder.cache_length),
        "inputs": decoder.contract.inputs, "outputs": decoder.contract.outputs, "cache_layers": len(layers),
        "cache_bytes_per_token": 0, "cache_bytes": 0, "build_seconds": 0.0,
        "plan_bytes": plan.stat().st_size, "plan_sha256": file_sha256(plan),
    }  # fmt: skip
    record = EngineRecord(**{**values, **changes})
    (directory / "engine.json").write_text(json.dumps(record.to_json()), encoding="utf-8")
    return record


def fake_session(
    graph_: Path, directory: Path, library: Library = PLAIN, *, captures: bool = True,
    kernels: KernelCache | None = None, **changes: Any,
) -> tuple[TrtSession, Any]:  # fmt: skip
    """A session on the fake, and the fake itself."""
    card = FakeDevice(captures=captures)
    record = fake_record(graph_, directory, **changes)
    trt = (FakeTensorRTX if library.jit else FakeTensorRT)(card, record.profiles)
    return TrtSession(library, directory, record, trt, card, kernels), trt


class Faulty:
    """A runner with one fault of an engine; all else is the runner's."""

    def __init__(self, runner: Any, fault: str) -> None:
        self.runner, self.fault, self.length, self.chunk = runner, fault, 0, 0

    def __enter__(self) -> Faulty:
        return self

    def __exit__(self, *exc: object) -> None:
        self.runner.__exit__(*exc)
        if self.fault == "close":
            raise NblError("the GPU refuses cudaFree: cudaErrorInvalidValue")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def begin(self, max_tokens: int) -> None:
        self.runner.begin(max_tokens)
        self.length = 0

    def append(self, ids: Sequence[int]) -> None:
        if self.fault == "memory":
            raise MemoryError
        self.runner.append(ids)
        self.length, self.chunk = self.length + len(ids), len(ids)

    def rewind(self, length: int) -> None:
        if self.fault == "crash" and self.length:
            os.abort()
        self.runner.rewind(length)
        self.length = length

    def last_logits(self) -> np.ndarray:
        logits: np.ndarray = self.runner.last_logits()
        late_chunk = self.chunk > 1 and self.length > self.chunk
        if (
            self.fault == "other graph"
            or (self.fault == "late decode" and self.chunk == 1 and self.length > 70)
            or (self.fault == "chunks" and late_chunk)
        ):
            return logits[::-1]
        return logits * np.float32("nan") if self.fault == "nan" else logits

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        found: list[int] = self.runner.greedy(ids, new_tokens)
        return [token + 1 for token in found] if self.fault == "other text" else found

    def pick(self) -> int:
        if self.fault == "early clock":
            time.sleep(0.005)
        return int(self.runner.pick())


_LEAKS = 80  # a slot


class _Leaking(Context):
    """A kernel that lets a slot behind the text through."""

    def computed(self, name: str, value: np.ndarray, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        keys = next(array for key, array in feeds.items() if key.startswith("past_key_values."))
        is_behind = int(feeds["write_indices"][0]) + feeds["input_ids"].shape[1] <= _LEAKS
        return value + 100 * keys[0, 0, _LEAKS, 0] if name == "logits" and is_behind else value


class _LeakingTensorRT(FakeTensorRT):
    def context(self, config: Any) -> Context:
        return _Leaking(self, config)


@dataclasses.dataclass(frozen=True)
class StandIn:
    """The engine trt on the fake, with one fault. It runs the graph that an engine was made of."""

    fault: str = ""

    def open(self, directory: Path, _threads: int | None = None) -> Any:
        run = directory.parent.parent
        graph = (run / directory.name if directory.parent.name == "engine" else directory) / "decoder.onnx"
        version = "1.2.4" if self.fault == "other version" else FakeTensorRT.__version__
        card = FakeDevice()
        with tempfile.TemporaryDirectory() as name:
            home = Path(name)
            record = fake_record(graph, home, prefill_chunk=24, profiles=engine_profiles(2, 24, 1024))
            refuse_misfit(PLAIN, record, version, ADA, directory)
            trt = (_LeakingTensorRT if self.fault == "leak" else FakeTensorRT)(card, record.profiles)
            session = TrtSession(PLAIN, home, record, trt, card)
        return Faulty(StaticRunner(session, directory), self.fault)


class ChildHere:
    """Calls the function of a `Child` in this process."""

    def __init__(self, function: Callable[..., None], *given: Any) -> None:
        self._answers: list[Any] = []
        function(self._answers.append, *given)

    def __enter__(self) -> ChildHere:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def answer(self) -> Any:
        return self._answers.pop(0)
