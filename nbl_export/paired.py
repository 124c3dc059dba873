"""What rounds that ran side by side say of a ratio: its median, an interval, and a verdict that claims no more.

    pairs r_1 ... r_n  ─► median;  95% percentile bootstrap of it over the pairs, seeded  ─► faster | slower | neither

Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. Up to five pairs its ends are the lowest and
the highest pair. No interval inside that range exists that holds the true median more often than 1 - 2 (1/2)^n (sign
test), 94% for five pairs: `confidence` is then this figure, and below five pairs nothing is claimed. With six to
fifteen pairs of normal deviates the interval held the true median in 89 to 96 of 100 trials, a little less than it
says.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["CONFIDENCE", "FEWEST_PAIRS", "PairedRatio", "paired_ratio"]

CONFIDENCE = 0.95
FEWEST_PAIRS = 5
_RESAMPLES = 10_000


@dataclass(frozen=True)
class PairedRatio:
    """A median of paired ratios and its interval, whose ends belong to it.

    wins: pairs above 1.
    """

    ratio: float
    low: float
    high: float
    confidence: float
    pairs: int
    wins: int

    @property
    def verdict(self) -> str:
        """ "faster" or "slower" only where the interval lies on one side of 1."""
        if self.pairs < FEWEST_PAIRS:
            return "too few rounds"
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no clear difference"

    @property
    def interval(self) -> str:
        """What the interval is, in words."""
        if self.confidence < CONFIDENCE:
            held = f", {100 * self.confidence:.0f}%" if self.pairs > 1 else ""
            return f"range of {self.pairs} pair{'' if self.pairs == 1 else 's'}{held}"
        return f"{100 * self.confidence:.0f}% interval of {self.pairs} pairs"


def paired_ratio(before: Sequence[float], after: Sequence[float], seed: int = 0) -> PairedRatio:
    """before / after, pair by pair: above 1 where `after` took less time.

    Args:
        before, after: as many durations; the k-th of both ran one after the other.
        seed: of the resampling; the same input gives the same interval.
    """
    pairs = np.array([b / a for b, a in zip(before, after, strict=True)])
    drawn = np.random.default_rng(seed).integers(0, len(pairs), (_RESAMPLES, len(pairs)))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.median(pairs[drawn], axis=1), (tail, 100 - tail))
    return PairedRatio(
        ratio=statistics.median(pairs.tolist()),
        low=float(low),
        high=float(high),
        confidence=min(CONFIDENCE, 1 - 2 * 0.5 ** len(pairs)),
        pairs=len(pairs),
        wins=int((pairs > 1).sum()),
    )
