"""The mathematics against independent forms of it: SVD, float64 least squares, brute force."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nbl_export.errors import NblError
from nbl_export.methods.lmmse import Moments, fit, score


def moments(x: torch.Tensor, y: torch.Tensor) -> Moments:
    x, y = x.double(), y.double()
    return Moments(len(x), x.sum(0), y.sum(0), x.T @ x, y.T @ x, y.T @ y)


def sample(rows: int = 400, size: int = 12, noise: float = 0.5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated, offset rows and a noisy nonlinear response."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, size, generator=generator, dtype=torch.float64) @ mix + 3
    y = torch.tanh(x @ mix.T / size) + noise * torch.randn(rows, size, generator=generator, dtype=torch.float64) - 1
    return x, y


def test_fit_is_least_squares() -> None:
    x, y = sample()
    found = fit(moments(x, y), 0, ridge=0.0)
    design = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(design, y).solution
    np.testing.assert_allclose(found.weight, expected[:-1].T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.bias, expected[-1], rtol=1e-5, atol=1e-6)


def test_the_ridge_is_a_millionth_of_the_mean_variance_whatever_the_size() -> None:
    """Of uncorrelated inputs each weight is c / (variance + ridge); the least variance is as small as the ridge."""
    variances = torch.logspace(-6, 0, 256, dtype=torch.float64)
    zero, covariances = torch.zeros(256, dtype=torch.float64), torch.diag(variances)
    planted = Moments(10, zero, zero, 10 * covariances, 10 * 3 * covariances, 10 * 9 * covariances)
    expected = 3 * variances / (variances + 1e-6 * variances.mean())
    np.testing.assert_allclose(fit(planted, 0).weight.diagonal(), expected, rtol=1e-5)
    assert expected[0] < 2.9


def test_errors_are_those_of_the_fitted_map() -> None:
    x, y = sample()
    found = fit(moments(x, y), 0)
    residual = y - (x @ torch.from_numpy(found.weight).double().T + torch.from_numpy(found.bias).double())
    scored = score(moments(x, y), 0)
    squared = residual.square().sum().item()
    total = (y - y.mean(0)).square().sum().item()
    plus = x + y
    assert scored.nmse == pytest.approx(squared / total, rel=1e-5)
    assert scored.relative_error == pytest.approx(squared / (plus - plus.mean(0)).square().sum().item(), rel=1e-5)


def canonical_correlations(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The textbook way: whiten both by eigendecomposition, then an SVD."""

    def whiten(rows: torch.Tensor) -> torch.Tensor:
        centred = rows - rows.mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
        return centred @ vectors @ torch.diag(values.rsqrt()) @ vectors.T / len(rows) ** 0.5

    return torch.linalg.svdvals(whiten(x).T @ whiten(y))


@pytest.mark.parametrize("noise", [0.0, 0.5, 20.0])
def test_cholesky_bound_equals_the_svd_form(noise: float) -> None:
    x, y = sample(noise=noise)
    rho = canonical_correlations(x, x + y)
    assert score(moments(x, y), 0, ridge=0.0).bound == pytest.approx((1 - rho.square()).sum().item(), rel=1e-8)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), noise=st.floats(0, 5), rows=st.integers(50, 300))
def test_bound_bounds_the_error_of_the_residual_output(seed: int, noise: float, rows: int) -> None:
    """Theorem of the paper: NMSE of x + y, each direction whitened, is at most the bound (here: equal in sum)."""
    x, y = sample(rows=rows, noise=noise, seed=seed)
    found = score(moments(x, y), 0, ridge=1e-9)
    plus = x + y
    map_plus = torch.linalg.lstsq(x - x.mean(0), plus - plus.mean(0)).solution
    error = (plus - plus.mean(0) - (x - x.mean(0)) @ map_plus).square().sum() / (plus - plus.mean(0)).square().sum()
    assert error.item() <= found.bound + 1e-6


def test_rank_deficient_input_is_fitted_by_the_ridge() -> None:
    x, y = sample(rows=400)
    x[:, 3] = x[:, 5] * 2
    found = fit(moments(x, y), 4)
    assert np.isfinite(found.weight).all()


def off_by(noise: float, directions: int = 6) -> tuple[Moments, torch.Tensor, torch.Tensor]:
    """Moments of inputs that span some directions, off by that share of an entry as sums of float32 products are."""
    x, y = sample(rows=400)
    x = x[:, :directions] @ torch.randn(directions, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = moments(x, y)
    error = torch.randn(12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    xx = found.xx + noise * found.xx.diagonal().mean() * (error + error.T)
    return dataclasses.replace(found, xx=xx), x, y


def test_a_ridge_rises_above_the_error_of_the_sums(caplog: pytest.LogCaptureFixture) -> None:
    """The map is nearly that of the exact sums, and the log names the layer once."""
    rough, x, y = off_by(1e-5)
    for _ in range(2):
        found = fit(rough, 41)
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and said[0].startswith("layer 41: the calibration text has too few different inputs")
    exact = fit(moments(x, y), 42)
    ours, theirs = (x.float().numpy() @ m.weight.T + m.bias for m in (found, exact))
    assert np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max()
    assert score(rough, 41).relative_error < 1


def test_sums_that_are_far_off_are_refused() -> None:
    with pytest.raises(NblError, match="layer 43: the calibration statistics are not positive definite"):
        fit(off_by(0.3)[0], 43)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_statistics_name_the_layer(value: float) -> None:
    x, y = sample()
    x[3, 4] = value
    with pytest.raises(NblError, match="layer 7"):
        fit(moments(x, y), 7)


def test_constant_input_names_the_layer() -> None:
    x, y = sample()
    with pytest.raises(NblError, match="layer 2: its input does not vary"):
        fit(moments(torch.ones_like(x), y), 2)
