"""Maps of low rank: laws of the fit, and two products instead of one in the graph."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from nbl_export.errors import UsageError
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.mixers.linear import Linear
from nbl_export.mixers.lmmse import EXPLAINED, Fitted, fit
from nbl_export.model.checkpoint.load import load_model
from nbl_export.model.linearize import linearize
from nbl_export.options.goals import read_rank
from nbl_export.plan.maps_file import load_maps, save_maps
from nbl_export.records.plan import TAPS, Plan
from nbl_export.rewrite import rewrite
from nbl_export.targets.onnx_files import check_maps
from nbl_export.verify.ladder import run_rows

from ..command import nbl
from ..mixers.test_lmmse import moments, sample
from ..rewrite.test_rewrite import rows, worst
from ..tiny import HEAD_DIM, HIDDEN, LAYERS

Exported = Callable[..., Path]
SIZE = 12
TOLERANCE = 2e-4  # of fp32 logits, as in test_rewrite
seeds = st.integers(0, 10_000)


def error(affine: Linear | Fitted, x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean squared error of the map in float64, from its factors where it has some."""
    weight = affine.weight if affine.up is None or affine.down is None else affine.up.astype("d") @ affine.down
    found = x @ torch.from_numpy(weight).double().T + torch.from_numpy(affine.bias).double()
    return (y - found).square().sum(1).mean().item()


@settings(max_examples=25, deadline=None)
@given(seed=seeds, noise=st.floats(0, 3))
def test_error_falls_with_the_rank_down_to_the_full_fit(seed: int, noise: float) -> None:
    x, y = sample(noise=noise, seed=seed)
    m = moments(x, y)
    errors = [error(fit(m, 0, ridge=0.0, rank=k), x, y) for k in range(1, SIZE + 1)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
    full = fit(m, 0, ridge=0.0)
    last = fit(m, 0, ridge=0.0, rank=SIZE)
    np.testing.assert_array_equal(last.weight, full.weight)
    np.testing.assert_array_equal(last.bias, full.bias)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, rank=st.integers(1, SIZE - 1))
@example(seed=361, rank=1)  # weights of several hundred, whose float32 rounding is above 1e-5
def test_no_other_map_of_the_rank_is_better(seed: int, rank: int) -> None:
    """Random competitors, each with the best right factor and bias for its left one, near to and far from the fit."""
    x, y = sample(seed=seed)
    m = moments(x, y)
    best = fit(m, 0, ridge=0.0, rank=rank)
    assert np.linalg.matrix_rank(best.weight, tol=1e-5 * np.linalg.norm(best.weight, 2)) == rank  # float32 entries
    least = error(best, x, y)
    full = torch.from_numpy(fit(m, 0, ridge=0.0).weight).double()
    generator = torch.Generator().manual_seed(seed)
    left_best = torch.linalg.svd(torch.from_numpy(best.weight).double()).U[:, :rank]
    for spread in (0.01, 0.3, 100.0):
        noise = torch.randn(SIZE, rank, generator=generator, dtype=torch.float64)
        left = torch.linalg.qr(left_best + spread * noise).Q
        weight = left @ left.T @ full
        bias = y.mean(0) - weight @ x.mean(0)
        rival = Linear(weight.float().numpy(), bias.float().numpy())
        assert least <= error(rival, x, y) * (1 + 1e-6)


def test_the_best_of_a_rank_is_the_truncated_svd_where_the_input_is_white() -> None:
    """Eckart-Young: with Cxx = I the fitted outputs' leading directions are the singular vectors of W."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, SIZE, generator=generator, dtype=torch.float64)
    x = torch.linalg.qr(x - x.mean(0)).Q * 400**0.5
    weight = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight)
    found = fit(moments(x, x @ weight.T + 2), 0, ridge=0.0, rank=3)
    np.testing.assert_allclose(found.weight, (u[:, :3] * s[:3]) @ vh[:3], atol=1e-5)


def test_two_factors_where_they_are_cheaper_and_one_matrix_where_not() -> None:
    m = moments(*sample())
    for rank in range(1, SIZE):
        found = fit(m, 0, rank=rank)
        assert (found.up is not None) == (2 * rank < SIZE)
        if found.up is not None and found.down is not None:
            assert found.up.shape == (SIZE, rank) and found.down.shape == (rank, SIZE)
            np.testing.assert_array_equal(found.up @ found.down, found.weight)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, planted=st.integers(1, SIZE - 1))
def test_auto_finds_the_smallest_rank_that_explains_enough(seed: int, planted: int) -> None:
    x, _ = sample(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(SIZE, planted, generator=generator, dtype=torch.float64) for _ in range(2))
    y = x @ right @ left.T + 1
    found = fit(moments(x, y), 0, ridge=0.0, rank="auto")
    kept = [1 - error(fit(moments(x, y), 0, ridge=0.0, rank=k), x, y) / y.var(0, False).sum().item()
            for k in range(1, SIZE + 1)]  # fmt: skip
    smallest = next(k for k, share in enumerate(kept, 1) if share >= EXPLAINED)
    assert smallest <= planted
    assert (None if found.up is None else found.up.shape[1]) == (smallest if 2 * smallest < SIZE else None)


def low_rank(*layers: int, rank: int = 5) -> dict[int, Linear]:
    def make(layer: int) -> Linear:
        rng = np.random.default_rng(layer)
        up, down = rng.standard_normal((HIDDEN, rank)) / 3, rng.standard_normal((rank, HIDDEN)) / 3
        return Linear.factored(up.astype("f"), down.astype("f"), rng.standard_normal(HIDDEN).astype("f"))

    return {layer: make(layer) for layer in layers}


def test_factors_round_trip(tmp_path: Path) -> None:
    save_maps({**low_rank(1), 2: Linear(np.eye(3, dtype="f"), np.ones(3, "f"))}, tmp_path / "maps.safetensors")
    names = set(load_file(tmp_path / "maps.safetensors"))
    assert names == {"layers.1.up", "layers.1.down", "layers.1.bias", "layers.2.weight", "layers.2.bias"}
    back = load_maps(tmp_path / "maps.safetensors", (1, 2))
    assert back[2].rank is None
    for name in ("weight", "bias", "up", "down"):
        np.testing.assert_array_equal(getattr(back[1], name), getattr(low_rank(1)[1], name))


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("source", ["genai", "mobius"])
def test_graph_of_thin_products_agrees_with_torch(
    source: str, tap: str, exported: Exported, checkpoint: Any, tmp_path: Path
) -> None:
    maps = low_rank(0, 2)
    rewrite(exported("llama", source), tmp_path / "nbl", Plan(LAYERS, (0, 2), tap), maps)
    model = linearize(load_model(checkpoint("llama")), maps, tap)
    with torch.inference_mode():
        expected = [model(torch.tensor([row]), use_cache=False).logits[0].numpy() for row in rows()]
    assert worst(run_rows(OnnxDecoder(tmp_path / "nbl", HEAD_DIM), rows()), expected) < TOLERANCE
    names = [n.name for n in ir.load(tmp_path / "nbl" / "model.onnx").graph if (n.name or "").startswith("/nbl/")]
    assert names == [f"/nbl/layers.{i}/{n}" for i in (0, 2) for n in ("MatMulDown", "MatMulUp", "Add")]
    assert [r.passed for r in check_maps("nbl", tmp_path / "nbl", maps)] == [True]


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("rank", [5, 30])
def test_thin_products_are_read_back_out_of_the_graph(
    precision: str, rank: int, exported: Exported, tmp_path: Path
) -> None:
    maps = low_rank(1, rank=rank)
    rewrite(exported("llama", "genai", precision), tmp_path / "nbl", Plan(LAYERS, (1,)), maps)
    graph = ir.load(tmp_path / "nbl" / "model.onnx").graph
    products = [n.op_type for n in graph if (n.name or "").startswith("/nbl/layers.1/MatMul")]
    assert products == ["MatMul" if precision == "fp32" else "MatMulNBits"] * 2
    (result,) = check_maps("nbl", tmp_path / "nbl", maps)
    assert result.passed, result.detail
    good = maps[1]
    assert good.up is not None and good.down is not None
    wrong_up, wrong_down, wrong_bias = good.up.copy(), good.down.copy(), good.bias.copy()
    wrong_up[3, 2] += 1
    wrong_down[2, 7] += 1
    wrong_bias[0] += 1
    for bad, word in (
        (Linear.factored(wrong_up, good.down, good.bias), "up"),
        (Linear.factored(good.up, wrong_down, good.bias), "down"),
        (Linear.factored(good.up, good.down, wrong_bias), "bias"),
        (Linear(good.weight, good.bias), "has no map"),
    ):
        (result,) = check_maps("nbl", tmp_path / "nbl", {1: bad})
        assert not result.passed and word in result.detail
    (result,) = check_maps("nbl", tmp_path / "nbl", {1: good, 2: good})
    assert not result.passed and "layer 2 has no map" in result.detail


@pytest.mark.parametrize(("precision", "provider"), [("fp32", "cpu"), ("int4", "cpu"), ("int4", "nv-tensorrt-rtx")])
def test_low_rank_ships_verified(precision: str, provider: str, same: tuple[object, ...], tmp_path: Path) -> None:
    """A GPU's int4 graph computes in fp16, so it has no float32 twin and is only compared."""
    run = tmp_path / "run"
    made = ("--precision", precision, "--provider", provider)
    done = nbl(*same, "--layers", "1,2", "--rank", "20", *made, "--output", run)
    assert done.status == 0, done.err
    facts = json.loads((run / "nbl.json").read_text())
    status = "verified" if provider == "cpu" else "compared"
    assert (facts["status"], facts["ranks"]) == (status, {"1": 20, "2": 20})
    assert "--rank 20" in facts["command"]
    assert load_file(run / "maps.safetensors")["layers.1.down"].shape == (20, HIDDEN)


def test_auto_and_back(run: Path) -> None:
    assert nbl("plan", run, "--rank", "auto").status == 0
    assert all(2 * k < HIDDEN for k in json.loads((run / "nbl.json").read_text())["ranks"].values())
    done = nbl("plan", run, "--rank", str(HIDDEN))
    assert done.status == 0 and "calibrate: reused" in done.err
    assert json.loads((run / "nbl.json").read_text())["ranks"] == {}


def test_bad_ranks_are_refused() -> None:
    for text in ("0", "-1", "1.5", "all", ""):
        with pytest.raises(UsageError, match="neither a number"):
            read_rank(text)
