"""Looks of a test: their sizes, the windows that they read, and how often all of their intervals hold the truth."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from nbl_export.records.quality import interval_ends
from nbl_export.records.sequential import describe_looks, level, looks_of, order_of

DRAWS = 2000


@pytest.mark.parametrize(("looks", "constant"), [(1, 1.960), (2, 2.178), (3, 2.289), (4, 2.361), (5, 2.413)])
def test_equal_looks_have_the_constants_of_pocock(looks: int, constant: float) -> None:
    """Jennison and Turnbull 2000, Group Sequential Methods with Applications to Clinical Trials, table 2.1."""
    found = level(tuple(range(8, 8 * looks + 1, 8)))
    assert NormalDist().inv_cdf((1 + found) / 2) == pytest.approx(constant, abs=6e-4)


@pytest.mark.parametrize(
    ("windows", "looks"),
    [(3, (3,)), (8, (8,)), (9, (8, 9)), (16, (8, 16)), (20, (8, 16, 20)), (32, (8, 16, 32)), (99, (8, 16, 32))],
)
def test_looks_double_until_the_text_ends(windows: int, looks: tuple[int, ...]) -> None:
    assert looks_of(windows, 8) == looks
    order = order_of(windows, looks)
    assert len(set(order)) == len(order) == looks[-1] and max(order) < windows
    for size in looks:
        gaps = np.diff(sorted(order[:size]))
        assert gaps.size == 0 or gaps.max() - gaps.min() <= 1  # spread over the text


@pytest.mark.parametrize(
    ("windows", "looks", "said"),
    [(8, (8, 16, 32), "look 1 of 3"), (32, (8, 16, 32), "look 3 of 3"), (8, (8, 16), "look 1 of 2"),
     (16, (8, 16), "look 2 of 2, where the text ends"), (3, (3,), "look 1 of 1, where the text ends"), (5, (), "")],
)  # fmt: skip
def test_a_look_is_told(windows: int, looks: tuple[int, ...], said: str) -> None:
    assert describe_looks(windows, looks) == said


@pytest.mark.parametrize("correlation", [0.0, 0.5])
@pytest.mark.parametrize("looks", [(8, 16, 32), (8, 16, 20)])
def test_intervals_of_all_looks_hold_the_mean_together(looks: tuple[int, ...], correlation: float) -> None:
    """Of 100 rows of windows, 95 at least; intervals of one look alone hold it less often."""
    rows = np.random.default_rng(3).standard_normal((DRAWS, looks[-1]))
    for k in range(1, looks[-1]):
        rows[:, k] = correlation * rows[:, k - 1] + math.sqrt(1 - correlation**2) * rows[:, k]
    order = order_of(looks[-1], looks)
    held = np.ones(DRAWS, bool)
    for size in looks:
        low, high = interval_ends(rows[:, sorted(order[:size])], looks)
        held &= (low <= 0) & (high >= 0)
    assert held.mean() >= 0.945
