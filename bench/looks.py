"""Simulates the test of a finished job: level, power and the windows that it reads (`nbl_export.records.sequential`).

    python bench/looks.py > bench/results/looks.json
    python bench/looks.py --check        # simulate again, and compare with the raw result

A trial is a text of 32 windows. Its paired differences of loss are those of `bench/window_intervals.py`: a first-order
autoregression around the true loss, of one standard deviation in points of perplexity. The limit is 5%. Rules:

- `looks`: 8, 16 and 32 windows, spread over the text, until a verdict
- `once`: the first 8 windows of the text, with an interval for a number of windows that was fixed beforehand

`within` and `beyond` are the shares of trials with this verdict; `windows` is the mean of those read, `first` the share
of trials that the first look ends.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from window_intervals import DIFFERENCES, rows_of

from nbl_export.records.quality import interval_ends
from nbl_export.records.sequential import looks_of, order_of

RESULT = Path(__file__).parent / "results" / "looks.json"
TRIALS = 10_000
WINDOWS = 32
FIRST = 8
LIMIT = 5.0
SPREAD = 1.3  # points: about that of documentation in the default job of SmolLM2 (1.1) and of Qwen (2.0)
LOSSES = (2.0, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0)
KINDS = ("normal", "skewed (lognormal, sigma 0.5)")
CORRELATIONS = (0.0, 0.5)
CLOSE = 0.003  # of a share of trials: rounding differs between machines

Verdicts = dict[str, float]


def _verdicts(ends: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    low_T, high_T = ends
    return high_T <= LIMIT, low_T > LIMIT


def by_looks(x_TW: np.ndarray) -> Verdicts:
    """The verdict of the look that ended a text, of differences in the order of the text."""
    looks = looks_of(WINDOWS, FIRST)
    order = order_of(WINDOWS, looks)
    open_T = np.ones(len(x_TW), bool)
    found = {"within": 0.0, "beyond": 0.0, "windows": 0.0, "first": 0.0}
    for size in looks:
        within_T, beyond_T = _verdicts(interval_ends(x_TW[:, sorted(order[:size])], looks))
        ended_T = open_T & (within_T | beyond_T | (size == looks[-1]))
        found["within"] += float(np.mean(ended_T & within_T))
        found["beyond"] += float(np.mean(ended_T & beyond_T))
        found["windows"] += size * float(np.mean(ended_T))
        found["first"] += float(np.mean(ended_T)) if size == looks[0] else 0.0
        open_T &= ~ended_T
    return {name: round(value, 4) for name, value in found.items()}


def once(x_TW: np.ndarray) -> Verdicts:
    """The verdict of the first windows."""
    within_T, beyond_T = _verdicts(interval_ends(x_TW[:, :FIRST]))
    return {"within": round(float(np.mean(within_T)), 4), "beyond": round(float(np.mean(beyond_T)), 4)}


def row(differences: str, correlation: float, loss: float, trials: int = TRIALS) -> dict[str, Any]:
    """Verdicts of both rules for a true loss in points."""
    shape = DIFFERENCES[differences]
    unit = SPREAD / float(shape(np.random.default_rng(1).standard_normal(1_000_000)).std())
    x_TW = loss + unit * shape(rows_of(WINDOWS, correlation, trials))
    case = {"differences": differences, "correlation": correlation, "loss": loss}
    return {**case, "looks": by_looks(x_TW), "once": once(x_TW)}


def differs(stored: dict[str, Any], anew: dict[str, Any]) -> bool:
    """Whether a simulated row is not the stored one."""
    shares = ("within", "beyond")
    return any(abs(stored[rule][name] - anew[rule][name]) > CLOSE for rule in ("looks", "once") for name in shares)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    found = [row(kind, r, loss) for kind in KINDS for r in CORRELATIONS for loss in LOSSES]
    if not check:
        facts = {"trials": TRIALS, "windows": WINDOWS, "first": FIRST, "limit": LIMIT, "spread": SPREAD}
        print(json.dumps({**facts, "rows": found}, indent=1))
        return 0
    stored = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    wrong = [new for old, new in zip(stored, found, strict=True) if differs(old, new)]
    print(*map(json.dumps, wrong), sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
