"""Simulates how often the intervals of paired ratios contain the true median.

    python bench/intervals.py --trials 5000 > bench/results/intervals.json

A load gives two rounds of two decoders. The logarithm of a duration is the sum of a part of the load and a part of the
round; `correlation` is the share of the load's part. Rows: kind of noise and correlation. Columns:

- the sign interval of `nbl_export.records.paired` with one ratio for each load, at 6, 12 and 24 loads
- the same interval when `nbl_export.measure.rounds.Rule` ends the rounds (the lowest of several spreads)
- the sign interval with rounds treated as independent, at 12 loads
- the signed-rank interval (Hodges and Lehmann) of the loads, at 12 and 24 loads
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nbl_export.measure.rounds import INTERIM_ROUNDS, NARROW, Rule
from nbl_export.records.paired import CONFIDENCE, PairedRatio, paired_ratio

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
CORRELATIONS = (0.0, 0.5, 0.95)
SPREADS = (0.03, 0.06, 0.12)  # of log durations, for rounds that the rule ends
SPREAD = 0.05
ROUNDS = 2


def _normal(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.normal(size=shape)


def _delays(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.lognormal(0, 1, shape) / 2


def _tails(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.clip(random.standard_t(2, shape), -40, 40)


def _held_up(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.exponential(1, shape)


def _none(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape)


NOISE: dict[str, tuple[Draw, Draw]] = {  # of both decoders, before and after
    "normal": (_normal, _normal),
    "delays, both (lognormal)": (_delays, _delays),
    "heavy tails (Student, 2 degrees)": (_tails, _tails),
    "delays, one decoder only (exponential)": (_held_up, _none),
}


def durations(random: np.random.Generator, draw: Draw, loads: int, correlation: float, spread: float) -> np.ndarray:
    """Durations of one decoder, [loads, ROUNDS]."""
    of_load, of_round = draw(random, (loads, 1)), draw(random, (loads, ROUNDS))
    return np.exp(spread * (math.sqrt(correlation) * of_load + math.sqrt(1 - correlation) * of_round))


@functools.cache
def true_median(noise: str, correlation: float, spread: float) -> float:
    """The true median ratio: 1 if both decoders have the same noise, else from a large sample."""
    before, after = NOISE[noise]
    if before is after:
        return 1.0
    random = np.random.default_rng(1)
    old, new = (durations(random, draw, 1_000_000, correlation, spread) for draw in (before, after))
    return float(np.median(old.sum(1) / new.sum(1)))


def holds(found: PairedRatio, truth: float) -> bool:
    return found.low <= truth <= found.high


def of_loads(old: np.ndarray, new: np.ndarray, loads: int) -> PairedRatio:
    which = np.repeat(np.arange(loads), ROUNDS).tolist()
    return paired_ratio(old[:loads].ravel().tolist(), new[:loads].ravel().tolist(), which)


def until_narrow(old: np.ndarray, new: np.ndarray) -> PairedRatio:
    """The ratio when `nbl_export.measure.rounds` would end the rounds, without a time limit."""
    rule, before, after = Rule(), old.sum(1).tolist(), new.sum(1).tolist()

    def of(loads: int) -> PairedRatio:
        return paired_ratio(before[:loads], after[:loads], range(loads))

    return of(next(n for n in itertools.count(1) if rule.ends(n, 0.0, map(of, [n]))))


def signed_rank(ratios: Sequence[float]) -> tuple[float, float]:
    """Exact interval of the pseudo-median: the k-th lowest and highest mean of two logarithms."""
    logs = np.log(ratios)
    first, second = np.triu_indices(len(logs))
    means = np.sort((logs[first] + logs[second]) / 2)
    k = _signed_rank_k(len(logs))
    return math.exp(means[k - 1]), math.exp(means[-k])


@functools.cache
def _signed_rank_k(count: int) -> int:
    ways = np.zeros(count * (count + 1) // 2 + 1)
    ways[0] = 1
    for rank in range(1, count + 1):
        ways[rank:] += ways[: len(ways) - rank].copy()
    below = np.cumsum(ways) / 2**count
    return int(np.sum(1 - 2 * below >= CONFIDENCE))


def row(noise: str, correlation: float, trials: int) -> dict[str, Any]:
    """Shares of trials whose interval contains the true median."""
    random = np.random.default_rng(0)
    held: dict[str, list[bool]] = {}
    width: dict[str, list[float]] = {}

    def note(name: str, low: float, high: float, truth: float) -> None:
        held.setdefault(name, []).append(low <= truth <= high)
        width.setdefault(name, []).append(high / low - 1)

    truth = true_median(noise, correlation, SPREAD)
    for _ in range(trials):
        old, new = (durations(random, draw, 24, correlation, SPREAD) for draw in NOISE[noise])
        for loads in (6, 12, 24):
            found = of_loads(old, new, loads)
            note(f"{loads} loads", found.low, found.high, truth)
        rounds = paired_ratio(old[:12].ravel().tolist(), new[:12].ravel().tolist(), range(12 * ROUNDS))
        note("12 loads, rounds as if independent", rounds.low, rounds.high, truth)
        ratios = old.sum(1) / new.sum(1)
        for loads in (12, 24):
            note(f"{loads} loads, signed rank", *signed_rank(ratios[:loads].tolist()), truth)
    ended = [_ended(noise, correlation, spread, trials) for spread in SPREADS]
    return {
        "noise": noise,
        "correlation": correlation,
        "held": {**{k: float(np.mean(v)) for k, v in held.items()}, "until narrow": min(e["held"] for e in ended)},
        "median_width": {k: float(np.median(v)) for k, v in width.items()},
        "until_narrow": ended,
    }


def _ended(noise: str, correlation: float, spread: float, trials: int) -> dict[str, float]:
    random = np.random.default_rng(0)
    truth = true_median(noise, correlation, spread)
    found = [
        until_narrow(*(durations(random, draw, INTERIM_ROUNDS[-1], correlation, spread) for draw in NOISE[noise]))
        for _ in range(trials)
    ]
    held = float(np.mean([holds(f, truth) for f in found]))
    return {"spread": spread, "held": held, "mean_loads": float(np.mean([f.loads for f in found]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5000)
    trials = parser.parse_args().trials
    rows = [row(noise, correlation, trials) for noise in NOISE for correlation in CORRELATIONS]
    about = {"trials": trials, "rounds_a_load": ROUNDS, "spread": SPREAD, "narrow": NARROW, "looks": INTERIM_ROUNDS}
    print(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
