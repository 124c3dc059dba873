"""Maps without a bias: least squares without an intercept, no addition in the graph, no bias after training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.methods.applied import linearize
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.distill.training import Callbacks, DistillSettings, distill
from nbl_export.methods.linear import collect
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.lmmse import fit, score
from nbl_export.methods.maps_file import load_maps
from nbl_export.methods.rewrite import rewrite
from nbl_export.targets.checks import judge_maps
from nbl_export.targets.onnx_files import read_maps
from nbl_export.verify.ladder import run_rows
from tests.command import configured, keys, nbl
from tests.methods.linear.test_rewrite import rows, worst
from tests.methods.test_lmmse import moments, sample
from tests.tiny import HEAD_DIM, HIDDEN, random_map

pytestmark = pytest.mark.job

Exported = Callable[..., Path]
TOLERANCE = 2e-4  # of fp32 logits, as in test_rewrite


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), noise=st.floats(0, 3))
def test_fit_is_least_squares_without_an_intercept(seed: int, noise: float) -> None:
    x, y = sample(noise=noise, seed=seed)
    found = fit(moments(x, y), 0, ridge=0.0, bias=False)
    np.testing.assert_allclose(found.weight, torch.linalg.lstsq(x, y).solution.T, rtol=1e-4, atol=1e-5)
    assert not found.bias.any() and found.bias.shape == (12,)
    squared = (y - x @ torch.from_numpy(found.weight).double().T).square().sum().item()
    scored, affine = (score(moments(x, y), 0, ridge=0.0, bias=bias) for bias in (False, True))
    assert scored.nmse == pytest.approx(squared / (y - y.mean(0)).square().sum().item(), rel=1e-4)
    assert scored.nmse >= affine.nmse * (1 - 1e-9) and scored.bound == affine.bound


def linear(*layers: int) -> dict[int, Linear]:
    return {i: Linear(random_map(i).weight, np.zeros(HIDDEN, np.float32)) for i in layers}


@pytest.mark.parametrize("source", ["genai", "mobius"])
def test_graph_has_a_product_and_no_addition(
    source: str, exported: Exported, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    maps = linear(0, 2)
    rewrite(exported("llama", source), tmp_path / "nbl", maps, "normed")
    model = linearize(load_model(checkpoint("llama")), maps, "normed")
    with torch.inference_mode():
        expected = [model(torch.tensor([row]), use_cache=False).logits[0].numpy() for row in rows()]
    assert worst(run_rows(OnnxDecoder(tmp_path / "nbl", HEAD_DIM), rows()), expected) < TOLERANCE
    graph = ir.load(tmp_path / "nbl" / "model.onnx").graph
    assert [n.name for n in graph if (n.name or "").startswith("/nbl/")] == [f"/nbl/layers.{i}/MatMul" for i in (0, 2)]
    assert not [name for name in graph.initializers if name.startswith("nbl.") and name.endswith(".bias")]
    result = judge_maps("nbl", read_maps(tmp_path / "nbl"), maps)
    assert result.passed, result.detail
    result = judge_maps("nbl", read_maps(tmp_path / "nbl"), {**maps, 2: random_map(2)})
    assert not result.passed and "layer 2 has no bias" in result.detail


def test_training_leaves_the_bias_at_zero(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("llama"))
    windows = torch.randint(3, 200, (8, 64), generator=torch.Generator().manual_seed(0))
    found = collect.collect(model, windows, lambda _d, _t: None, ("normed",))["normed"]
    maps = {i: Linear(*fit(found[i], i, bias=False)) for i in (1, 2)}
    how = DistillSettings(steps=24, batch_tokens=256, check_every=8, lora_rank=4, label_weight=0.0)
    result: Any = distill(model, maps, "normed", windows, windows[:2], how, Callbacks())
    assert min(kl for _, kl in result.held_kl) < result.held_kl[0][1]
    for i, affine in result.maps.items():
        assert affine.product() is not None and (affine.weight != maps[i].weight).any()


def test_a_run(same: tuple[object, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = nbl(*same, "--layers", "1,2", *configured(maps="linear"), "--output", run)
    assert done.status == 0, done.err
    facts = json.loads((run / "nbl.json").read_text())
    assert facts["tap"] == "normed" and facts["options"]["maps"] == "linear"
    assert 'maps = "linear"' in facts["command"]
    assert not any(m.product() is None for m in load_maps(run / "maps.safetensors", (1, 2)).values())
    changed = nbl("plan", run, *keys(maps="affine"))
    assert changed.status == 0, changed.err
    assert all(m.product() is None for m in load_maps(run / "maps.safetensors", (1, 2)).values())
