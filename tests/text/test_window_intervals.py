"""Intervals over windows: how often they hold the truth, what pairs are worth, and how many digits are shown."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nbl_export.text.window_intervals import (
    _stretch,
    _student,
    increase_interval,
    mean_interval,
    spoken_interval,
    windows_needed,
)

DRAWS = 4000
# One value a window, and its mean: as heavy and as skewed as windows of text, or more.
WINDOWS = {
    "normal": (lambda rng, size: rng.standard_normal(size), 0.0),
    "t with 3 degrees": (lambda rng, size: rng.standard_t(3, size), 0.0),
    "exponential": (lambda rng, size: rng.exponential(1.0, size), 1.0),
    "lognormal, sigma 0.5": (lambda rng, size: rng.lognormal(0, 0.5, size), math.exp(0.125)),
    "lognormal, sigma 0.75": (lambda rng, size: rng.lognormal(0, 0.75, size), math.exp(0.75**2 / 2)),
}


@pytest.mark.parametrize("count", [16, 32])
@pytest.mark.parametrize("name", list(WINDOWS))
def test_at_least_93_of_100_intervals_hold_the_mean(name: str, count: int) -> None:
    draw, truth = WINDOWS[name]
    rows = draw(np.random.default_rng(11), (DRAWS, count))
    found = [mean_interval(row) for row in rows]
    held = np.mean([(f.low or 0.0) <= truth <= (f.high or 0.0) for f in found])
    assert 0.93 <= held <= 0.98


@pytest.mark.parametrize(("correlation", "least"), [(0.3, 0.92), (0.67, 0.85)])
def test_windows_like_their_neighbours_give_longer_intervals(correlation: float, least: float) -> None:
    """Without this 87 and 63 of 100 intervals of such windows hold the mean."""
    fresh = np.random.default_rng(7).standard_normal((DRAWS, 16))
    rows = fresh.copy()
    for k in range(1, 16):
        rows[:, k] = correlation * rows[:, k - 1] + math.sqrt(1 - correlation**2) * fresh[:, k]
    held = np.mean([(f.low or 0.0) <= 0 <= (f.high or 0.0) for f in map(mean_interval, rows)])
    assert held >= least


def test_increase_is_held_as_often_for_losses_that_share_what_is_hard() -> None:
    """Losses of the windows differ by far more than what the replacement adds to them."""
    rng = np.random.default_rng(5)
    before = rng.normal(3.0, 0.6, (DRAWS, 16))
    after = before + 0.3 * rng.lognormal(0, 0.5, before.shape)
    truth = math.expm1(0.3 * math.exp(0.125))
    found = [increase_interval(b, a) for b, a in zip(before, after, strict=True)]
    held = np.mean([(f.low or 0.0) <= truth <= (f.high or 0.0) for f in found])
    assert 0.93 <= held <= 0.98
    alone = [mean_interval(a) for a in after]
    assert np.median([_width(f) for f in found]) < 0.6 * np.median([_width(f) for f in alone])


def _width(found: object) -> float:
    return float(found.high - found.low)  # type: ignore[attr-defined]


def test_value_is_the_ratio_of_perplexities() -> None:
    before, after = np.array([1.0, 2.0, 3.0]), np.array([1.2, 2.1, 3.6])
    found = increase_interval(before, after)
    assert found.value == pytest.approx(math.exp(after.mean()) / math.exp(before.mean()) - 1)
    assert found.low is not None and found.high is not None and found.low < 0.35 < found.high


def test_a_skewed_sample_reaches_further_to_its_long_side() -> None:
    x = np.array([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 4.0, 8.0])
    right, left = mean_interval(x), mean_interval(-x)
    assert right.high - right.value > 1.2 * (right.value - right.low)  # type: ignore[operator]
    assert (left.low, left.high) == pytest.approx((-right.high, -right.low))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (15, 2.1314), (16, 2.1199), (31, 2.0395), (1000, 1.9623)],
)
def test_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert _student(degrees) == pytest.approx(quantile, abs=6e-5)


def test_what_windows_cannot_say() -> None:
    assert mean_interval([0.5]).ends is None and mean_interval([0.5]).value == 0.5
    assert mean_interval([0.5, math.nan]).value is None
    assert increase_interval([1.0, math.inf], [1.0, 2.0]).value is None
    assert mean_interval([0.5, 0.5, 0.5]).ends == [0.5, 0.5]
    assert mean_interval([0.98, 1.0, 1.0], (0.0, 1.0)).high == 1.0


def test_windows_needed_decide() -> None:
    """Half an interval of so many windows is the distance to the goal."""
    rng = np.random.default_rng(3)
    before = np.zeros(16)
    after = 0.06 + 0.05 * rng.standard_normal(16)
    needed = windows_needed(before.tolist(), after.tolist(), 0.05)
    assert needed is not None and needed > 16
    gap = after.mean() - math.log1p(0.05)
    stretch = _stretch(after)
    assert needed == pytest.approx((1.96 * stretch * after.std(ddof=1) / gap) ** 2, rel=0.01, abs=1)
    assert windows_needed([0.0], [0.1], 0.05) is None


@pytest.mark.parametrize(
    ("value", "ends", "percent", "text"),
    [
        (0.4532, (0.3812, 0.5291), True, "+45% (38 to 53)"),
        (0.1234, (0.1094, 0.1381), True, "+12.3% (10.9 to 13.8)"),
        (-0.004, (-0.0043, -0.0036), True, "−0.40% (−0.43 to −0.36)"),
        (1.31, (0.9, 1.9), True, "+131% (90 to 190)"),
        (0.18249, (0.1751, 0.1899), False, "+0.182 (0.175 to 0.190)"),
        (0.45, None, True, "+45%"),
        (0.0, (0.0, 0.0), True, "+0% (0 to 0)"),
        (None, None, True, "not finite"),
    ],
)
def test_digits_are_those_that_the_interval_supports(
    value: float | None, ends: tuple[float, float] | None, percent: bool, text: str
) -> None:
    assert spoken_interval(value, ends, percent=percent, sign=True) == text
