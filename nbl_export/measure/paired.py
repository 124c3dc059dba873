"""The speed ratio of two decoders that ran side by side: median over loads, an interval, and a verdict.

    rounds of one load ─► one ratio;   r_1 <= ... <= r_n ─► median;  [r_k, r_(n+1-k)] ─► faster | slower | neither

Rounds of one load are not independent, so a load counts once. The interval is that of the sign test (Conover,
Practical Nonparametric Statistics, chapter 3.4). For any noise, the interval contains the true median with probability
1 - 2 P(Binomial(n, 1/2) < k). k is the largest value whose probability is at least 95%. Up to eight loads, k is 1 and
the interval is the range of all loads. Five loads reach 94%; fewer loads give no verdict.

The signed-rank interval is narrower if noise affects both decoders alike. It misses the median too often if noise
delays only one of them (bench/intervals.py).
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CONFIDENCE", "FEWEST_LOADS", "PairedRatio", "paired_ratio"]

CONFIDENCE = 0.95
FEWEST_LOADS = 5


@dataclass(frozen=True)
class PairedRatio:
    """The median of the loads' ratios and its closed interval.

    confidence: of the exact test, 0 for one load. wins: number of loads with a ratio above 1.
    """

    ratio: float
    low: float
    high: float
    confidence: float
    loads: int
    wins: int

    @property
    def verdict(self) -> str:
        """ "faster" or "slower" only if the interval lies on one side of 1."""
        if self.loads < FEWEST_LOADS:
            return "too few loads"
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no clear difference"

    @property
    def interval(self) -> str:
        """The kind of interval in words."""
        if self.loads == 1:
            return "one load"
        kind = "interval" if self.confidence >= CONFIDENCE else "range"
        return f"{100 * self.confidence:.0f}% {kind} of {self.loads} loads"


def paired_ratio(before: Sequence[float], after: Sequence[float], loads: Sequence[int]) -> PairedRatio:
    """The ratio before / after, above 1 if `after` took less time. A load's ratio is that of its summed durations.

    Args:
        before, after: durations, equally many; the k-th of both ran one after the other.
        loads: the load of each duration.
    """
    sums: dict[int, tuple[float, float]] = {}
    for old, new, load in zip(before, after, loads, strict=True):
        done = sums.get(load, (0.0, 0.0))
        sums[load] = (done[0] + old, done[1] + new)
    ratios = sorted(old / new for old, new in sums.values())
    rank = _rank(len(ratios))
    return PairedRatio(
        ratio=statistics.median(ratios),
        low=ratios[rank - 1],
        high=ratios[-rank],
        confidence=_confidence(len(ratios), rank),
        loads=len(ratios),
        wins=sum(ratio > 1 for ratio in ratios),
    )


@functools.cache
def _rank(count: int) -> int:
    """The largest k whose interval reaches `CONFIDENCE`; at least 1."""
    return max((k for k in range(1, count // 2 + 1) if _confidence(count, k) >= CONFIDENCE), default=1)


def _confidence(count: int, rank: int) -> float:
    """Confidence of [r_(k), r_(n+1-k)], which misses the median if fewer than k ratios lie on one side of it."""
    return 1 - 2 * sum(math.comb(count, below) for below in range(rank)) / 2**count
