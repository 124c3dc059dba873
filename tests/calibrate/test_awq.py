"""--quantize awq: scales by activations before rounding to int4, and the proof that the float function stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from nbl_export.calibrate import awq as rescale_module
from nbl_export.calibrate.awq import Group, Seen, choose, load_scales, rounded, save_scales
from nbl_export.errors import CorruptError

from ..command import nbl
from ..jobs import until

Same = tuple[object, ...]
AWQ = ("--precision", "int4", "--quantize", "awq")
METRIC = "rescaled model: max abs logit difference"


def checks(run: Path) -> list[dict[str, Any]]:
    return list(json.loads((run / "verify.json").read_text(encoding="utf-8"))["checks"])


# -- the choice ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "block"), [(64, 32), (128, 16)])
def test_rounding_is_the_exporters(columns: int, block: int) -> None:
    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(0))
    blocks = weight.numpy().reshape(24, -1, block)
    step = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1) / -8  # that element is the code -8
    wanted = np.clip(np.rint(blocks / step), -8, 7) * step
    np.testing.assert_allclose(rounded(weight, block).numpy(), wanted.reshape(24, columns), rtol=1e-6)
    assert rounded(torch.randn(3, 40), 32).shape == (3, 40)  # the last columns are no whole block


def planted(spread: float) -> tuple[Group, Seen]:
    """A matrix behind a norm, and rows in which some channels are larger by a factor."""
    generator = torch.Generator().manual_seed(0)
    reader = nn.Linear(64, 48, bias=False)
    reader.weight.data = torch.randn(48, 64, generator=generator)
    rows = torch.randn(512, 64, generator=generator)
    rows[:, ::8] *= spread
    seen = Seen(every=2)
    for part in rows.split(100):
        seen.add(part)
    return Group("layers.0.qkv", 0, (reader,), nn.RMSNorm(64)), seen


def test_large_channels_are_stretched_and_even_ones_are_not() -> None:
    group, seen = planted(30.0)
    assert seen.count == 512 and seen.sample_RK.shape == (256, 64)
    choice = choose([group], {group.name: seen}, 32, lambda *_: None)[group.name]
    assert choice.exponent > 0 and choice.error < 0.8
    assert choice.scale_C[::8].min() > choice.scale_C[1::8].max()
    even = choose([group], {group.name: planted(1.0)[1]}, 32, lambda *_: None)[group.name]
    assert even.error <= 1.0  # plain rounding is among the choices


def test_a_head_that_is_shared_gets_one_scale_a_channel() -> None:
    group = Group("layers.0.o", 0, (nn.Linear(64, 8),), nn.Linear(8, 32), repeats=2, head_dim=16)
    channels = torch.arange(32.0)
    spread = group.spread(channels)
    assert spread.view(2, 2, 16)[:, 0].equal(spread.view(2, 2, 16)[:, 1])
    assert group.gathered(spread).equal(channels)


def test_a_damaged_file_of_scales_is_refused(tmp_path: Path) -> None:
    save_scales({"layers.0.qkv": torch.tensor([1.0, 0.0])}, tmp_path / "scales.safetensors")
    with pytest.raises(CorruptError, match="not positive"):
        load_scales(tmp_path / "scales.safetensors")
    (tmp_path / "scales.safetensors").write_bytes(b"no")
    with pytest.raises(CorruptError, match="cannot be read"):
        load_scales(tmp_path / "scales.safetensors")


# -- the job ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tap", [pytest.param("residual", marks=pytest.mark.fuzz), "normed"])
def test_the_job_proves_the_function_and_reuses_the_calibration(same: Same, tap: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with until("verify"):
        plain = nbl(*same, "--tap", tap, "--precision", "int4", "--output", run)
    assert plain.status == 0, plain.err
    before = norms(run)
    with until("verify"):
        done = nbl(*same, "--tap", tap, *AWQ, "--output", run)
    assert done.status == 0, done.err
    assert "calibrate: reused" in done.err and "plan: reused" in done.err
    proof = next(r for r in checks(run) if r["metric"] == METRIC)
    assert proof["passed"] and 0 < proof["value"] < 1e-3
    facts = json.loads((run / "nbl.json").read_text(encoding="utf-8"))
    found = facts["quantize"]["groups"]
    assert len(found) == 12 and all(0 <= g["error"] <= 1 for g in found.values())
    assert "--quantize awq" in facts["command"]
    after = norms(run)
    assert before.keys() == after.keys()
    moved = [name for name in before if not np.allclose(before[name], after[name])]
    assert len(moved) >= 3 and not any("final_norm" in name for name in moved)
    if tap == "normed":
        with until("verify"):
            back = nbl(*same, "--tap", tap, "--precision", "int4", "--output", run)
        assert back.status == 0 and METRIC not in {r["metric"] for r in checks(run)}


def norms(run: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(str(run / "original" / "model.onnx")).graph
    return {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith("norm.weight")}


def test_a_scale_that_moves_halfway_fails_the_proof(
    same: Same, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halfway(group: Group, scale: torch.Tensor) -> None:
        for reader in group.readers:
            reader.weight.mul_(group.spread(scale))

    monkeypatch.setattr(rescale_module, "_move", halfway)
    failed = nbl(*same, *AWQ, "--output", tmp_path / "run")
    assert failed.status == 3 and METRIC in failed.err, failed.err


def test_plain_rounding_by_its_name(same: Same, tmp_path: Path) -> None:
    with until("rewrite"):
        assert nbl(*same, "--precision", "int4", "--quantize", "rtn", "--output", tmp_path / "run").status == 0
    assert not (tmp_path / "run" / "scales.safetensors").exists()
