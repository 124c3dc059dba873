"""Paired ratios: a load counts once, the interval is exact, and nothing is claimed that it does not carry."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.measure.rounds import INTERIM_ROUNDS, Rule
from nbl_export.records.paired import LEVEL_UNTIL_NARROW, PairedRatio, describe_ratio, paired_ratio


def of_loads(*ratios: float) -> PairedRatio:
    return paired_ratio(ratios, [1.0] * len(ratios), range(len(ratios)))


def test_it_is_the_median_of_loads_and_not_the_ratio_of_medians() -> None:
    found = paired_ratio([1, 6, 2, 9, 3], [0.5, 2, 1.6, 4, 2], range(5))
    assert found.ratio == 2
    assert found.loads == 5


def test_rounds_of_a_load_count_once() -> None:
    """Their ratio is that of their durations together, whatever order the rounds stand in."""
    found = paired_ratio([3, 1, 6, 2], [1, 1, 1, 4], [0, 1, 0, 1])
    assert (found.loads, found.low, found.high) == (2, 3 / 5, 9 / 2)
    doubled = paired_ratio([1.2] * 12, [1.0] * 12, [i // 2 for i in range(12)])
    assert doubled == of_loads(*[1.2] * 6)
    assert of_loads(*[1.2] * 4).verdict == paired_ratio([1.2] * 8, [1] * 8, [0, 0, 1, 1, 2, 2, 3, 3]).verdict


@pytest.mark.parametrize(
    ("count", "rank", "confidence"),
    # Conover 1999, table A3 (binomial with p = 1/2): 1 - 2 P(X < rank).
    [(2, 1, 0.5), (4, 1, 0.875), (5, 1, 0.9375), (6, 1, 0.96875), (8, 1, 0.9921875), (9, 2, 0.9609375),
     (12, 3, 0.96142578125), (15, 4, 0.96484375), (20, 6, 0.9586105346679688)],
)  # fmt: skip
def test_the_interval_is_that_of_the_sign_test(count: int, rank: int, confidence: float) -> None:
    ratios = np.random.default_rng(count).permutation(np.linspace(1.1, 1.9, count))
    found = of_loads(*ratios)
    ordered = sorted(ratios)
    assert (found.low, found.high) == (ordered[rank - 1], ordered[-rank])
    assert found.confidence == pytest.approx(confidence, abs=1e-12)


def test_what_is_claimed_is_what_the_test_gives() -> None:
    assert [of_loads(*[1.2] * n).interval for n in (1, 4, 5, 6, 9)] == [
        "one load", "87.5% range of 4 loads", "93.8% range of 5 loads", "96.9% interval of 6 loads",
        "96.1% interval of 9 loads",
    ]  # fmt: skip


def test_loads_that_a_width_ended_have_the_level_of_the_simulation() -> None:
    """The raw result's worst row, not the exact level of a number of loads that was fixed beforehand."""
    stored = Path(__file__).parents[2] / "bench" / "results" / "intervals.json"
    rows = json.loads(stored.read_text(encoding="utf-8"))["rows"]
    assert round(min(row["held"]["until narrow"] for row in rows), 3) == LEVEL_UNTIL_NARROW
    found = paired_ratio([1.2] * 12, [1.0] * 12, range(12), until_narrow=True)
    assert (found.confidence, found.interval) == (0.944, "94.4% interval of 12 loads, ended by its width")


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ((1.2,) * 4, "too few loads"),
        ((1.2,) * 5, "faster"),
        ((0.8,) * 5, "slower"),
        ((1.2, 1.2, 1.2, 1.2, 1.0), "no clear difference"),  # an end of 1 contains 1
        ((0.8, 0.8, 0.8, 0.8, 1.0), "no clear difference"),
        ((1.5, 1.5, 1.5, 1.5, 0.9), "no clear difference"),
        ((1.5,) * 19 + (0.9,), "faster"),  # one bad load of twenty
        ((1.0,) * 9, "no clear difference"),
    ],
)
def test_an_interval_with_one_inside_is_no_win(ratios: tuple[float, ...], verdict: str) -> None:
    assert of_loads(*ratios).verdict == verdict


def test_a_ratio_near_one_is_not_rounded_to_one() -> None:
    assert [describe_ratio(ratio) for ratio in (1.004, 0.996, 1.25)] == ["1.004", "0.996", "1.25"]


def test_rounds_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1, 2], [1], [0, 1])


# -- coverage ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated() -> list[dict[str, Any]]:
    """Rows of `bench/intervals.py`: four kinds of noise, three correlations within a load."""
    script = Path(__file__).parents[2] / "bench" / "intervals.py"
    command = [sys.executable, str(script), "--trials", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return found


@pytest.mark.process
def test_intervals_hold_the_median_whatever_the_correlation_and_the_noise(simulated: list[dict[str, Any]]) -> None:
    """Also where rounds end by their width."""
    assert {row["correlation"] for row in simulated} == {0.0, 0.5, 0.95} and len(simulated) == 12
    columns = ("6 loads", "12 loads", "24 loads", "until narrow")
    assert min(row["held"][c] for row in simulated for c in columns) >= 0.93


@pytest.mark.process
def test_rounds_taken_for_independent_would_not(simulated: list[dict[str, Any]]) -> None:
    """So the simulation can tell."""
    name = "12 loads, rounds as if independent"
    assert max(row["held"][name] for row in simulated if row["correlation"] == 0.95) < 0.93


# -- when rounds end ---------------------------------------------------------------------------------------------

WIDE, CLOSE = of_loads(*[1.0] * 5, 1.2), of_loads(*[1.0] * 5, 1.05)


@pytest.mark.parametrize(
    ("rule", "done", "seconds", "ratios", "ends"),
    [
        (Rule(), 5, 1.0, [CLOSE], False),  # fewer than six give no 95%
        (Rule(), 6, 1.0, [CLOSE], True),
        (Rule(), 6, 1.0, [CLOSE, WIDE], False),
        (Rule(), 7, 1.0, [CLOSE], False),  # no look at what chance does from load to load
        (Rule(), 12, 1.0, [CLOSE], True),
        (Rule(), INTERIM_ROUNDS[-1] - 1, 1.0, [WIDE], False),
        (Rule(), INTERIM_ROUNDS[-1], 1.0, [WIDE], True),
        (Rule(seconds=70), 6, 36.0, [WIDE], True),  # twelve loads would take longer than 70 seconds
        (Rule(seconds=70), 5, 600.0, [WIDE], False),
        (Rule(seconds=70), 6, 34.0, [WIDE], False),
        (Rule(3), 2, 1.0, [CLOSE], False),
        (Rule(3), 3, 1.0, [WIDE], True),
        (Rule(30), 29, 9e9, [CLOSE], False),
        (Rule(), 6, 1.0, [], True),  # nothing to compare
    ],
)
def test_rounds_end_by_width_or_a_limit(
    rule: Rule, done: int, seconds: float, ratios: list[PairedRatio], ends: bool
) -> None:
    assert rule.ends(done, seconds, ratios) is ends


def test_a_verdict_ends_nothing() -> None:
    """A clear winner whose interval is wide is measured on, and a tie that is narrow is not."""
    winner, tie = of_loads(1.5, 1.6, 1.7, 1.8, 1.9, 2.0), of_loads(0.98, 0.99, 1.0, 1.0, 1.01, 1.02)
    assert (winner.verdict, tie.verdict) == ("faster", "no clear difference")
    assert not Rule().ends(6, 1.0, [winner]) and Rule().ends(6, 1.0, [tie])
