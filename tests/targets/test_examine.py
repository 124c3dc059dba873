"""What acceptance needs of an engine: element types, events, a plan without the runner."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import NblError
from nbl_export.targets.tensorrt.device import CudaPython, Torch
from nbl_export.targets.tensorrt.examine.bare import BarePlan, Output, sum_plan
from nbl_export.targets.tensorrt.examine.elements import empty, narrowed, widened
from nbl_export.targets.tensorrt.examine.timer import open_timer
from nbl_export.targets.tensorrt.library import LIBRARIES, load_library

from ..fake_tensorrt import FakeDevice, FakeTensorRT
from ..stand_in import StandIn
from ..tensorrt_api.held import held
from ..tensorrt_api.names import TRT_ONLY
from ..trt_tiny import RTX, needs_rtx


def test_bfloat16_is_rounded_as_elsewhere() -> None:
    from ml_dtypes import bfloat16

    rng = np.random.default_rng(0)
    numbers = np.concatenate([rng.standard_normal(1000) * 10.0 ** rng.integers(-30, 30, 1000), [0, -0.0, np.inf]])
    wide = numbers.astype(np.float32)
    expected = wide.astype(bfloat16)
    assert np.array_equal(narrowed(wide, "bfloat16"), expected.view(np.uint16))
    assert np.array_equal(widened(narrowed(wide, "bfloat16"), "bfloat16"), expected.astype(np.float32))
    assert np.isnan(widened(narrowed(np.array([np.nan], np.float32), "bfloat16"), "bfloat16")).all()
    assert empty((2, 3), "bfloat16").nbytes == 12
    assert widened(narrowed(np.ones(5, np.float32), "float16"), "float16").tolist() == [1.0] * 5


def test_the_events_of_both_packages_give_seconds() -> None:
    calls: list[str] = []

    def call(function: Any, *_arguments: Any) -> Any:
        calls.append(function)
        return 2.5 if function == "cudaEventElapsedTime" else function

    names = ("cudaEventCreate", "cudaEventRecord", "cudaEventSynchronize", "cudaEventElapsedTime")
    device = CudaPython.__new__(CudaPython)
    device._rt = types.SimpleNamespace(**{name: name for name in names})
    device._call, device._stream = call, None  # type: ignore[method-assign]
    timer = open_timer(device)
    timer.start()
    assert timer.stop() == 0.0025
    assert calls == [names[0], names[0], names[1], names[1], names[2], names[3]]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            calls.append(f"record on {stream}")

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, _other: Any) -> float:
            return 4.0

    torch = Torch.__new__(Torch)
    torch._torch, torch._stream = types.SimpleNamespace(cuda=types.SimpleNamespace(Event=Event)), "it"
    calls.clear()
    timer = open_timer(torch)
    timer.start()
    assert timer.stop() == 0.004
    assert calls == ["record on it", "record on it", "wait"]
    with pytest.raises(NblError, match="host memory has no events"):
        open_timer(FakeDevice())


@pytest.mark.parametrize("engine", LIBRARIES)
def test_a_plan_runs_without_the_runner(engine: str, tmp_path: Path) -> None:
    """Also a plan that requires memory of the user."""
    parts = StandIn(LIBRARIES[engine], tmp_path / "engine" / "model")
    parts.model.parent.mkdir()
    trt = parts.load()
    plan = BarePlan(parts.library, trt, parts.device(), parts.sum_plan(trt))
    x = np.array([[1, 2, 3, 4]], np.float32)
    found = plan.run({"x": (x, "float32")}, {"y": Output((1, 4), "float32")})
    assert found["y"].tolist() == [[2, 4, 6, 8]]
    with pytest.raises(NblError, match="TensorRT refuses the address of z: z is no tensor"):
        plan.run({"x": (x, "float32")}, {"z": Output((1, 4), "float32")})


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raises", "the library refuses to run the plan: CUDA error 700"),
        ("refused", "TensorRT refuses a step: CUDA error 719"),
    ],
)
def test_what_the_library_refuses_of_a_plan_is_an_error(fault: str, reason: str, tmp_path: Path) -> None:
    parts = StandIn(LIBRARIES["trt"], tmp_path / "engine" / "model", fault)
    parts.model.parent.mkdir()
    plan = BarePlan(parts.library, parts.load(), parts.device(), parts.sum_plan(None))
    with pytest.raises(NblError, match=reason):
        plan.run({"x": (np.ones((1, 4), np.float32), "float32")}, {"y": Output((1, 4), "float32")})


def test_a_plan_that_is_not_loaded_is_an_error(tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise TypeError("factory function returned nullptr")

    stub = types.SimpleNamespace(ILogger=FakeTensorRT.ILogger, Runtime=refuse, Builder=refuse)
    trt = held(stub, TRT_ONLY)
    with pytest.raises(NblError, match="the library does not load the plan: TypeError: factory function"):
        BarePlan(LIBRARIES["trt"], trt, FakeDevice(), b"")
    with pytest.raises(NblError, match="the library builds no sum: TypeError: factory function"):
        sum_plan(trt)
    stub.Runtime = lambda _logger: types.SimpleNamespace(
        deserialize_cuda_engine=lambda _plan: None, engine_host_code_allowed=True
    )
    with pytest.raises(NblError, match="the library does not load the plan: it gives no reason"):
        BarePlan(LIBRARIES["trt"], trt, FakeDevice(), b"")


@needs_rtx
def test_the_real_builder_gives_a_plan_of_a_sum() -> None:
    assert len(sum_plan(load_library(RTX))) > 1000
