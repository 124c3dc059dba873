"""Intervals over windows: how often they hold the truth, what pairs are worth, and how many digits are shown."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nbl_export.methods.losses import Loss
from nbl_export.records import quality
from nbl_export.records.quality import (
    _student,
    _weighed,
    describe_interval,
    describe_long_range,
    increase_ends,
    increase_interval,
    interval_ends,
    long_range_ends,
    long_range_row,
    loss_row,
    mean_interval,
    retrieval_row,
    verdict,
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


def correlated(correlation: float, count: int) -> np.ndarray:
    """Rows [DRAWS, count] of a first-order autoregression with mean 0 and variance 1."""
    rows = np.random.default_rng(7).standard_normal((DRAWS, count))
    for k in range(1, count):
        rows[:, k] = correlation * rows[:, k - 1] + math.sqrt(1 - correlation**2) * rows[:, k]
    return rows


def share_held(rows: np.ndarray, truth: float = 0.0) -> float:
    low, high = interval_ends(rows)
    return float(np.mean((low <= truth) & (truth <= high)))


@pytest.mark.parametrize("name", list(WINDOWS))
def test_at_least_93_of_100_intervals_hold_the_mean(name: str) -> None:
    draw, truth = WINDOWS[name]
    assert share_held(draw(np.random.default_rng(11), (DRAWS, 16)), truth) >= 0.93


@pytest.mark.parametrize("count", [4, 16, 64])
@pytest.mark.parametrize("correlation", [0, 0.67])
def test_as_many_hold_it_if_windows_are_like_their_neighbours(correlation: float, count: int) -> None:
    """Student's t holds the mean in 63 of 100 rows of 16 windows that correlate by 0.67."""
    assert share_held(correlated(correlation, count)) >= 0.93


@pytest.mark.parametrize(("count", "wider"), [(8, 2.5), (64, 1.1)])
def test_windows_that_do_not_correlate_pay_little_for_it(count: int, wider: float) -> None:
    rows = correlated(0, count)
    low, high = interval_ends(rows)
    assert np.mean(high - low) < wider * np.mean(2 * _student(count - 1) * rows.std(1, ddof=1) / math.sqrt(count))


def test_an_interval_is_that_of_students_t_if_no_correlation_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_LEAST_ALIKE", 0.0)
    monkeypatch.setattr(quality, "_MOST_ALIKE", 0.0)
    found = mean_interval([1.0, 2.0, 3.0, 2.0])
    assert found.ends == pytest.approx([2 - 3.1824 * math.sqrt(1 / 6), 2 + 3.1824 * math.sqrt(1 / 6)], rel=1e-4)


@pytest.mark.parametrize("r", [-0.3, 0.4, 0.9])
def test_sums_of_neighbours_are_the_least_squares_of_an_autoregression(r: float) -> None:
    """Shift and scale for one correlation, by the inverse of the whole matrix."""
    x = np.random.default_rng(2).standard_normal(9)
    inverse = np.linalg.inv(r ** np.abs(np.subtract.outer(np.arange(9), np.arange(9))))
    mean = inverse.sum(0) @ x / inverse.sum()
    scale = math.sqrt((x - mean) @ inverse @ (x - mean) / (8 * inverse.sum()))
    _, shift, found = _weighed((x - x.mean())[None], np.array([r]))
    assert (shift.item(), found.item()) == pytest.approx((mean - x.mean(), scale))


def test_the_likely_correlation_weighs_most() -> None:
    alike = np.linspace(-0.3, 0.92, 25)
    weights = _weighed(correlated(0.6, 256)[:1], alike)[0][:, 0]
    assert weights.sum() == pytest.approx(1)
    assert abs(float(weights @ alike) - 0.6) < 0.1


def test_increase_is_held_as_often_for_losses_that_share_what_is_hard() -> None:
    """Losses of the windows differ by far more than what the replacement adds to them."""
    rng = np.random.default_rng(5)
    before = rng.normal(3.0, 0.6, (200, 16))
    after = before + 0.3 * rng.lognormal(0, 0.5, before.shape)
    truth = math.expm1(0.3 * math.exp(0.125))
    found = [increase_interval(b, a) for b, a in zip(before, after, strict=True)]
    held = np.mean([(f.low or 0.0) <= truth <= (f.high or 0.0) for f in found])
    assert held >= 0.93
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
    assert increase_interval([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).ends == [0.0, 0.0]
    assert mean_interval([0.98, 1.0, 1.0], (0.0, 1.0)).high == 1.0


def test_no_loss_of_a_text_says_that_kl_may_be_below_zero() -> None:
    """Its interval ends at zero; that of the increase does not, since a replaced set can also help."""
    losses = [Loss(10, kl, 20.0, 20.0 + rise) for kl, rise in ((0.0, -0.1), (0.0, 0.2), (0.5, 0.0))]
    row = loss_row("a text", losses)
    assert row["kl"] == pytest.approx(0.5 / 30) and row["kl_interval"][0] == 0.0 < row["kl"] < row["kl_interval"][1]
    assert row["increase_interval"][0] < 0.0 < row["increase_interval"][1]
    assert (row["tokens"], row["windows"]) == (33, 3)


def test_rows_of_long_range_tokens_count_equally_however_many_they_have() -> None:
    row = long_range_row("a text", [(10, 20.0, 21.0, 10.0), (100, 200.0, 250.0, 100.0)])
    assert row["lost"] == pytest.approx((0.1 + 0.5) / 2) and row["tokens"] == 110
    assert row["perplexity_nbl"] == pytest.approx(math.exp((2.1 + 2.5) / 2))


def test_long_range_tokens_of_few_passages_are_told_and_not_judged() -> None:
    passage = (10, 20.0, 25.0, 10.0)
    for passages, ends in ((3, None), (4, (0.5, 0.5))):
        row = long_range_row("a text", [passage] * passages)
        assert long_range_ends(row) == (ends and pytest.approx(ends))
        assert describe_long_range(row).endswith("on a text (3 passages, too few to judge)") is (ends is None)
    assert long_range_ends(long_range_row("a text", [(10, 20.0, math.inf, 10.0)])) == (math.inf, math.inf)


def test_the_interval_of_long_range_tokens_knows_the_looks_of_its_test() -> None:
    passages = [(10, 20.0, 20.0 + lost, 10.0) for lost in (1.0, 2.0, 2.0, 4.0)]
    looks = (4, 8, 16)
    row = long_range_row("a text", passages, looks)
    assert row["lost_interval"] == mean_interval([0.1, 0.2, 0.2, 0.4], looks=looks).ends
    assert row["lost_interval"] != long_range_row("a text", passages)["lost_interval"] and row["looks"] == [*looks]


def test_an_increase_that_is_not_finite_is_beyond_every_limit() -> None:
    row = loss_row("a text", [Loss(10, 1.0, 20.0, after) for after in (21.0, math.inf)])
    assert row["increase"] is None and verdict(increase_ends(row), 1e9) == "beyond"
    assert verdict(increase_ends({"increase": 0.0, "increase_interval": None}), 1e9) == "undecided"  # of one window


def test_answers_whose_perplexity_is_not_finite_are_not_found() -> None:
    for before, judged in ((5.0, True), (1e5, False)):
        assert retrieval_row("items", [(10, before, before, 10.0)] * 2)["judged"] is judged


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
    assert describe_interval(value, ends, percent=percent, sign=True) == text


def test_rows_that_were_drawn_independently_have_students_interval() -> None:
    """Windows of one text have a wider one, since neighbours can be alike."""
    passages = [(10, 5.0, 5.0 + lost, 10.0) for lost in (0.1, 0.2, 0.3, 0.4)]
    low, high = retrieval_row("items", passages)["lost_interval"]
    half = 3.18245 * math.sqrt(5 / 3) * 0.01 / 2  # Student's t of three degrees, 97.5%
    assert (low, high) == pytest.approx((0.025 - half, 0.025 + half), rel=1e-5)
    wide = long_range_row("a text", passages)["lost_interval"]
    assert wide[0] < low and wide[1] > high
