"""The speed ratio of two decoders that ran side by side: median over loads, an interval, and a verdict.

`figures` makes the rows of a report from the timings of bench.json: one for each test and variant, and a ratio for each
test and pair of variants.

    rounds of one load ─► one ratio;   r_1 <= ... <= r_n ─► median;  [r_k, r_(n+1-k)] ─► faster | slower | neither

Rounds of one load are not independent, so a load counts once. The interval is that of the sign test (Conover,
Practical Nonparametric Statistics, chapter 3.4). For any noise, the interval contains the true median with probability
1 - 2 P(Binomial(n, 1/2) < k). k is the largest value whose probability is at least 95%. Up to eight loads, k is 1 and
the interval is the range of all loads. Five loads reach 93.75%; fewer loads give no verdict.

This level holds for a number of loads that was fixed beforehand. If the width of the interval ends the loads
(`rounds.Rule`), the level is lower: `LEVEL_UNTIL_NARROW`, by simulation.

The signed-rank interval is narrower if noise affects both decoders alike. It misses the median too often if noise
delays only one of them (bench/intervals.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbl_export.errors import CorruptError
from nbl_export.records.results import Timing

__all__ = [
    "CONFIDENCE",
    "FEWEST_LOADS",
    "LEVEL_UNTIL_NARROW",
    "PairedRatio",
    "describe_level",
    "describe_ratio",
    "exact_level",
    "figures",
    "paired_ratio",
]

CONFIDENCE = 0.95
FEWEST_LOADS = 5
LEVEL_UNTIL_NARROW = 0.944  # bench/results/intervals.json, "until narrow", of the worst noise and correlation


@dataclass(frozen=True)
class PairedRatio:
    """The median of the loads' ratios and its closed interval.

    confidence: level of the interval: of the exact test, 0 for one load; by simulation if `until_narrow`.
    until_narrow: whether the width of the interval ended the loads.
    """

    ratio: float
    low: float
    high: float
    confidence: float
    loads: int
    until_narrow: bool = False

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
        level = describe_level(self.confidence)
        if self.until_narrow:
            return f"{level} interval of {self.loads} loads, ended by its width"
        return f"{level} {'interval' if self.confidence >= CONFIDENCE else 'range'} of {self.loads} loads"


def paired_ratio(
    before: Sequence[float], after: Sequence[float], loads: Sequence[int], *, until_narrow: bool = False
) -> PairedRatio:
    """The ratio before / after, above 1 if `after` took less time. A load's ratio is that of its summed durations.

    Args:
        before, after: durations, equally many; the k-th of both ran one after the other.
        loads: the load of each duration.
        until_narrow: whether `rounds.Rule` ended the loads by the width of the interval.
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
        confidence=LEVEL_UNTIL_NARROW if until_narrow else exact_level(len(ratios)),
        loads=len(ratios),
        until_narrow=until_narrow,
    )


def exact_level(loads: int) -> float:
    """Level of the sign test's interval for a number of loads that was fixed beforehand; 0 for one load."""
    return _confidence(loads, _rank(loads))


def describe_level(level: float) -> str:
    """A level with one decimal place: "96.9%"."""
    return f"{100 * level:.1f}%"


@functools.cache
def _rank(count: int) -> int:
    """The largest k whose interval reaches `CONFIDENCE`; at least 1."""
    return max((k for k in range(1, count // 2 + 1) if _confidence(count, k) >= CONFIDENCE), default=1)


def _confidence(count: int, rank: int) -> float:
    """Confidence of [r_(k), r_(n+1-k)], which misses the median if fewer than k ratios lie on one side of it."""
    missed = 2 * sum(math.comb(count, below) for below in range(rank))
    return 1 - missed / (1 << count)


# -- figures of bench.json -------------------------------------------------------------------------------------


def figures(bench: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The speed of bench.json, in the order of the runs.

    rows: `Timing.figures` of every test and variant. ratios: tokens/s of every other variant divided by the base's,
    one for each test that both ran; none without a base.

    Raises:
        CorruptError: two variants have different rounds.
    """
    timings = [Timing.from_json(row) for row in bench.get("timings", ())]
    base = bench.get("base", "original")
    until_narrow = bench.get("repetitions") is None
    known = {(t.scenario, t.variant): t for t in timings}
    others = [t for t in timings if t.variant != base and (t.scenario, base) in known]
    ratios = [_ratio(known[t.scenario, base], t, until_narrow=until_narrow) for t in others]
    return {"rows": [timing.figures() for timing in timings], "ratios": ratios}


def _ratio(base: Timing, own: Timing, *, until_narrow: bool) -> dict[str, Any]:
    """Pair the rounds: round k of both variants ran one after the other, on the same load."""
    scenario = own.scenario
    counts = (len(base.samples_ns), len(own.samples_ns))
    if base.loads != own.loads or counts != (len(own.loads),) * 2:
        names = {"original": "the original", "nbl": "NBL"}
        raise CorruptError(
            f"bench.json has {counts[0]} rounds of {names.get(base.variant, base.variant)} and {counts[1]} of "
            f"{names.get(own.variant, own.variant)} for {scenario.test} at depth {scenario.depth}, not of the same "
            "loads; run the bench stage again"
        )
    found = paired_ratio(base.samples_ns, own.samples_ns, own.loads, until_narrow=until_narrow)
    return {
        **scenario.facts(),
        "variant": own.variant,
        "base": base.variant,
        **dataclasses.asdict(found),
        "interval": found.interval,
        "verdict": found.verdict,
        "text": f"{describe_ratio(found.ratio)}×" if found.verdict in ("faster", "slower") else found.verdict,
    }


def describe_ratio(ratio: float) -> str:
    """Two decimal places; three if two would give 1.00."""
    return f"{ratio:.2f}" if abs(ratio - 1) >= 0.005 else f"{ratio:.3f}"
