"""An engine directory and a session for the stand-in of TensorRT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nbl_export.targets.tensorrt.contexts import DEFAULT, Strategy
from nbl_export.targets.tensorrt.kernels import KernelCache
from nbl_export.targets.tensorrt.library import Library
from nbl_export.targets.tensorrt.record import EngineRecord, digest_of
from nbl_export.targets.tensorrt.runner import TrtSession
from nbl_export.targets.tensorrt.static.on_ort import open_decoder
from nbl_export.targets.tensorrt.static.schedule import engine_profiles

from .fake_tensorrt import FakeDevice, FakeTensorRT, FakeTensorRTX
from .tensorrt_api.held import held
from .tensorrt_api.names import RTX_ONLY, TRT_ONLY
from .trt_tiny import PLAIN

__all__ = ["fake_record", "fake_session"]


def fake_record(graph_: Path, directory: Path, **changes: Any) -> EngineRecord:
    """An engine directory for the fake: the plan is the path of a graph."""
    decoder = open_decoder(graph_)
    plan = directory / "decoder.engine"
    plan.write_bytes(str(graph_).encode())
    layers = decoder.contract.cache_layers
    values: dict[str, Any] = {
        "engine": "trt", "version": FakeTensorRT.__version__, "precision": "fp32", "attention": "fused",
        "compute_capabilities": ("8.9",), "capturable": None,
        "max_batch": 2, "prefill_chunk": 8, "max_seq_len": decoder.slots,
        "profiles": engine_profiles(2, 8, decoder.slots),
        "inputs": decoder.contract.inputs, "outputs": decoder.contract.outputs, "cache_layers": len(layers),
        "cache_bytes_per_token": 0, "cache_bytes": 0, "parse_seconds": 0.0, "build_seconds": 0.0,
        "plan_bytes": plan.stat().st_size, "plan_sha256": digest_of(plan), "graph_sha256": {},
    }  # fmt: skip
    record = EngineRecord(**{**values, **changes})
    (directory / "engine.json").write_text(json.dumps(record.to_json()), encoding="utf-8")
    return record


def fake_session(
    graph_: Path, directory: Path, library: Library = PLAIN, *, captures: bool = True,
    strategy: Strategy = DEFAULT, kernels: KernelCache | None = None, **changes: Any,
) -> tuple[TrtSession, Any]:  # fmt: skip
    """A session on the fake, held to the names of the bindings, and the fake itself."""
    card = FakeDevice(captures=captures)
    record = fake_record(graph_, directory, **changes)
    trt = (FakeTensorRTX if library.jit else FakeTensorRT)(card, record.profiles)
    seen = held(trt, RTX_ONLY if library.jit else TRT_ONLY)
    return TrtSession(library, directory, record, seen, card, strategy, kernels), trt
