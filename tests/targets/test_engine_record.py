"""engine.json: values of another kind are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbl_export.errors import CorruptError
from nbl_export.records.decoder import TensorInfo
from nbl_export.targets.tensorrt.record import EngineRecord, read_record
from nbl_export.targets.tensorrt.static.schedule import Profile

DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("name", "value"),
    [("plan_sha256", [DIGEST]), ("engine", {}), ("max_batch", "1"), ("plan_bytes", None), ("cache_bytes", "1"),
     ("profiles", [{"name": "p", "batch": [1, 1], "tokens": [1, 1, 1]}]), ("inputs", [{"name": "x"}]),
     ("compute_capabilities", [8.9]), ("gpu", "missing")],
)  # fmt: skip
def test_a_record_with_a_value_of_another_kind(name: str, value: object, tmp_path: Path) -> None:
    profile, tensor = Profile("prefill", (1, 1, 1), (1, 8, 8)), TensorInfo("input_ids", "int64", (1, "tokens"))
    record = EngineRecord(
        "trt", "10.15", "fp16", "fused", ("8.9",), "NVIDIA L4", 1, 8, 64, (profile,), (tensor,), (), 0, 0, 0, 0.5, 0,
        DIGEST,
    )  # fmt: skip
    (tmp_path / "decoder.engine").write_bytes(b"")
    values = json.loads(json.dumps(record.to_json()))
    (tmp_path / "engine.json").write_text(json.dumps(values))
    assert read_record(tmp_path) == record
    values[name] = value
    if value == "missing":
        del values[name]
    (tmp_path / "engine.json").write_text(json.dumps(values))
    with pytest.raises(CorruptError, match=rf"engine.json cannot be read \(.*(shape|batch|dtype|{name})"):
        read_record(tmp_path)
