"""Which other runtime a finished run names, because that runtime reads prompts faster on a CPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbl_export.options.options import JobOptions
from nbl_export.records.decoder import DecoderSpec
from nbl_export.run.settled import faster_engine
from nbl_export.run.stages import bench
from nbl_export.targets import load_engine
from nbl_export.targets.base import Availability

SPEC = DecoderSpec("llama", 2, 64, 4, 2, 16, 100, 512)


def named(directory: Path, decoder: DecoderSpec = SPEC, **options: Any) -> str | None:
    """The engine that a job's report would name."""
    asked = JobOptions("m", **{"precision": "int8", **options})
    job: Any = SimpleNamespace(
        engine=load_engine(asked.engine, asked.provider),
        options=asked,
        decoder=decoder,
        run=SimpleNamespace(path=directory),
    )
    found = faster_engine(job)
    return None if found is None else found.capabilities.name


def test_onnx_runtime_on_a_cpu_alone_names_another(tmp_path: Path) -> None:
    assert named(tmp_path) == "openvino"
    assert named(tmp_path, engine="openvino") is None
    assert named(tmp_path, provider="cuda", precision="int4") is None
    assert named(tmp_path, engine="trt", precision="bf16") is None


def test_what_the_other_engine_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbl_export.model import architectures

    assert named(tmp_path, precision="int4", quantized_model="codes") is None
    assert named(tmp_path, dataclasses.replace(SPEC, sliding_window=64)) is None
    assert named(tmp_path, precision="bf16") is None
    record = architectures.ARCHITECTURES["llama"]
    monkeypatch.setitem(
        architectures.ARCHITECTURES, "llama", dataclasses.replace(record, not_from={"openvino": "a reason"})
    )
    assert named(tmp_path) is None


@pytest.mark.parametrize(
    "rope", [{"rope_parameters": {"rope_type": "longrope"}}, {"rope_scaling": {"type": "longrope"}}]
)
def test_rotation_that_the_other_engine_refuses(rope: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "config.json").write_text(json.dumps(rope))
    assert named(tmp_path) is None
    others: tuple[Any, ...] = ({"rope_scaling": {"type": "linear"}}, [], {"rope_scaling": 7})
    for other in others:
        (tmp_path / "original" / "config.json").write_text(json.dumps(other))
        assert named(tmp_path) == "openvino"


def test_what_this_machine_lacks_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    other = load_engine("openvino")
    monkeypatch.setattr(other, "probe", lambda **_: Availability(False, "pip install '.[openvino]'"))
    found = bench._faster(other, load_engine("ort").capabilities)["faster"]
    assert found["lacks"] == "pip install '.[openvino]'"
    assert bench._faster(None, load_engine("openvino").capabilities) == {}


@pytest.mark.job
def test_a_finished_run_names_the_runtime(finished: Path) -> None:
    assert json.loads((finished / "bench.json").read_text())["faster"]["engine"] == "openvino"
    assert "<span>--engine</span> <span>openvino</span>" in (finished / "report.html").read_text()
    for file in (finished / "report.md", finished.parent / "stderr"):
        assert "--engine openvino --output OTHER" in file.read_text()
