"""Times end when the device has finished, not when a call comes back: GenAI over a device that answers early.

append_tokens   puts work on the device and comes back at once
get_logits      wait for the work; only then the clock has moved
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.measure import benchmark
from nbl_export.measure.benchmark import BenchSetting
from nbl_export.measure.footprint import Footprint
from nbl_export.measure.instruments import Instruments
from nbl_export.measure.rounds import Variant
from nbl_export.records.results import Scenario
from nbl_export.targets.onnx.genai import GenaiRunner

NS_PER_TOKEN = 10


class Device:
    """A clock that moves only when somebody waits for the work on the device."""

    def __init__(self, kind: str) -> None:
        self.kind, self.now, self.queued = kind, 0, 0

    def wait(self) -> None:
        self.now += self.queued
        self.queued = 0


class Generator:
    """og.Generator on such a device."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def append_tokens(self, ids: np.ndarray) -> None:
        self._device.queued += NS_PER_TOKEN * ids.shape[-1]

    def get_logits(self) -> np.ndarray:
        self._device.wait()
        return np.zeros((1, 1, 8), np.float32)

    def rewind_to(self, length: int) -> None:
        self._device.wait()


def genai_on(device: Device) -> types.ModuleType:
    """onnxruntime_genai as far as a GenaiRunner uses it."""
    module = types.ModuleType("onnxruntime_genai")
    settings = types.SimpleNamespace(overlay=lambda text: None)
    vars(module).update(
        Config=lambda path: settings,
        Model=lambda config: types.SimpleNamespace(device_type=device.kind),
        GeneratorParams=lambda model: types.SimpleNamespace(set_search_options=lambda **options: None),
        Generator=lambda model, params: Generator(device),
    )
    return module


def timed(kind: str, scenarios: Sequence[Scenario], directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """(test, depth) -> nanoseconds of the only run."""
    device = Device(kind)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", genai_on(device))
    found = benchmark.run(
        {"nbl": Variant(directory, lambda path, threads: GenaiRunner(path, 1), 1)},
        scenarios, 1, lambda done, total: None,
        setting=BenchSetting(8, 64, "ort", base=None),
        instruments=Instruments(clock=lambda: device.now, idle=lambda: True),
        measure=lambda *arguments: Footprint(1, 1),
    )  # fmt: skip
    return {(t["test"], t["depth"]): t for t in found["timings"]}


SCENARIOS = (Scenario("pp", 16, 0), Scenario("pp", 8, 24), Scenario("tg", 4, 24))


@pytest.mark.parametrize("kind", ["NvTensorRtRtx", "CUDA", "WebGPU"])
def test_a_time_ends_when_the_device_has_finished(
    kind: str, genai_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = timed(kind, SCENARIOS, genai_dirs["nbl"], monkeypatch)
    assert found["pp16", 0]["samples_ns"] == [16 * NS_PER_TOKEN]
    assert found["pp8", 24]["samples_ns"] == [8 * NS_PER_TOKEN]
    assert found["tg4", 24]["token_ns"] == [[NS_PER_TOKEN] * 4]


def test_without_the_wait_the_clock_is_wrong(genai_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same device that claims to be a CPU, for which nothing waits: so the test above can fail."""
    found = timed("CPU", SCENARIOS, genai_dirs["nbl"], monkeypatch)
    assert [t["samples_ns"] for t in found.values()] == [[0], [0], [0]]
