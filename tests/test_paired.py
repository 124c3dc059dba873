"""Paired ratios: the interval is that of the median over pairs, and nothing is claimed that it does not carry."""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pytest

from nbl_export.paired import PairedRatio, paired_ratio


def of_pairs(*pairs: float, seed: int = 0) -> PairedRatio:
    return paired_ratio(pairs, [1.0] * len(pairs), seed)


def test_it_is_the_median_of_pairs_and_not_the_ratio_of_medians() -> None:
    found = paired_ratio([1, 6, 2, 9, 3], [0.5, 2, 1.6, 4, 2])
    assert found.ratio == 2
    assert (found.pairs, found.wins) == (5, 5)


def test_up_to_five_pairs_the_interval_is_their_range_and_says_so() -> None:
    for count, held in ((2, 0.5), (3, 0.75), (4, 0.875), (5, 0.9375)):
        pairs = np.linspace(1.1, 1.5, count)
        found = of_pairs(*pairs)
        assert (found.low, found.high) == (pairs[0], pairs[-1])
        assert found.confidence == held
        assert found.interval == f"range of {count} pairs, {100 * held:.0f}%"


def test_from_six_pairs_on_it_is_the_percentile_bootstrap() -> None:
    """Against the exact distribution of the median of seven draws from seven pairs."""
    pairs = np.array([0.9, 1.1, 1.2, 1.3, 1.4, 1.5, 1.9])
    # P(median of 7 draws <= k-th smallest) = P(at least 4 draws are among the k smallest)
    below = [sum(comb(7, j) * (k / 7) ** j * (1 - k / 7) ** (7 - j) for j in range(4, 8)) for k in range(1, 8)]
    low = pairs[next(k for k, p in enumerate(below) if p > 0.025)]
    high = pairs[next(k for k, p in enumerate(below) if p > 0.975)]
    found = of_pairs(*pairs)
    assert (found.low, found.high) == (low, high) == (1.1, 1.5)
    assert found.interval == "95% interval of 7 pairs"
    assert found.verdict == "faster"


def test_the_same_input_gives_the_same_interval_whatever_the_order() -> None:
    pairs = np.random.default_rng(1).normal(1.2, 0.2, 20)
    assert of_pairs(*pairs) == of_pairs(*pairs)
    others = {(of_pairs(*pairs, seed=s).low, of_pairs(*pairs, seed=s).high) for s in range(5)}
    assert all(abs(a[0] - b[0]) < 0.05 and abs(a[1] - b[1]) < 0.05 for a, b in itertools.combinations(others, 2))


@pytest.mark.parametrize(
    ("pairs", "verdict"),
    [
        ((1.2,) * 4, "too few rounds"),
        ((1.2,) * 5, "faster"),
        ((0.8,) * 5, "slower"),
        ((1.2, 1.2, 1.2, 1.2, 1.0), "no clear difference"),  # an end of 1 contains 1
        ((0.8, 0.8, 0.8, 0.8, 1.0), "no clear difference"),
        ((1.5, 1.5, 1.5, 1.5, 0.9), "no clear difference"),
        ((1.5,) * 19 + (0.9,), "faster"),  # one bad round of twenty
        ((1.0,) * 9, "no clear difference"),
    ],
)
def test_an_interval_with_one_inside_is_no_win(pairs: tuple[float, ...], verdict: str) -> None:
    assert of_pairs(*pairs).verdict == verdict


def test_pairs_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1, 2], [1])
