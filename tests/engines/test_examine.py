"""What acceptance needs of an engine: element types, events, a plan without the runner, names of the library."""

from __future__ import annotations

import ast
import inspect
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.engines.tensorrt.device import CudaPython, Torch
from nbl_export.engines.tensorrt.examine import bare, examined
from nbl_export.engines.tensorrt.examine.bare import BarePlan, Output
from nbl_export.engines.tensorrt.examine.elements import empty, narrowed, widened
from nbl_export.engines.tensorrt.examine.timer import open_timer
from nbl_export.engines.tensorrt.library import LIBRARIES, load_library
from nbl_export.errors import NblError

from ..fake_tensorrt import FakeDevice
from ..stand_in import StandIn
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


def test_a_plan_runs_without_the_runner(tmp_path: Path) -> None:
    parts = StandIn(LIBRARIES["trt"], tmp_path / "engine" / "model")
    parts.model.parent.mkdir()
    trt = parts.load()
    plan = BarePlan(trt, parts.device(), parts.sum_plan(trt))
    x = np.array([[1, 2, 3, 4]], np.float32)
    found = plan.run({"x": (x, "float32")}, {"y": Output((1, 4), "float32")})
    assert found["y"].tolist() == [[2, 4, 6, 8]]
    with pytest.raises(NblError, match="the library refuses the address of z"):
        plan.run({"x": (x, "float32")}, {"z": Output((1, 4), "float32")})


# What the variables of both files are, in the library's classes.
CLASSES = {
    "engine": "ICudaEngine", "_engine": "ICudaEngine", "context": "IExecutionContext", "builder": "Builder",
    "network": "INetworkDefinition", "inspector": "EngineInspector", "_runtime": "Runtime",
}  # fmt: skip


@needs_rtx
@pytest.mark.parametrize("module", [bare, examined], ids=lambda module: module.__name__.rsplit(".", 1)[1])
def test_every_name_is_in_the_installed_library(module: types.ModuleType) -> None:
    trt = load_library(RTX)
    seen = 0
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, (ast.Name, ast.Attribute)):
            continue
        owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
        if owner in ("trt", "_trt"):
            assert hasattr(trt, node.attr), node.attr
        elif owner in CLASSES:
            assert hasattr(getattr(trt, CLASSES[owner]), node.attr), (owner, node.attr)
            seen += 1
    assert seen > 5
