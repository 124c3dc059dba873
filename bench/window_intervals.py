"""Simulates how often intervals of a mean over windows of text contain the mean, and how wide they are.

    python bench/window_intervals.py > bench/results/coverage-perplexity.json
    python bench/window_intervals.py --check        # simulate again, and compare with the raw result

A row of windows is a first-order autoregression: neighbours correlate by `correlation`. For other differences than
normal ones, each value goes through the distribution function. Methods:

- `this`: `nbl_export.records.quality`
- `t`: Student's t, as if windows were independent
- `estimated`: from 8 windows on longer by sqrt((1 + r) / (1 - r)), with the estimated r limited to 0 to 0.7;
  corrected for skewness as `this`
- `blocks`: t over four blocks of adjacent windows
- `cosines`: t with three degrees and the variance of the first three cosines (Lazarus et al. 2018, HAR Inference)

`width` is the mean length over that of `t` with the true standard deviation and independent windows.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.records.quality import _corrected as corrected
from nbl_export.records.quality import _student as student
from nbl_export.records.quality import interval_ends

RESULT = Path(__file__).parent / "results" / "coverage-perplexity.json"
TRIALS = 5000
WINDOWS = (4, 8, 16, 32, 64)
CORRELATIONS = (0.0, 0.5, 0.67)
CLOSE = 0.003  # of a share of trials: rounding differs between machines

Ends = tuple[np.ndarray, np.ndarray]


def normal(z_TW: np.ndarray) -> np.ndarray:
    return z_TW


def skewed(z_TW: np.ndarray) -> np.ndarray:
    """Lognormal with sigma 0.5, of skewness 1.75, around its mean."""
    return np.exp(0.5 * z_TW) - math.exp(0.125)


def heavy(z_TW: np.ndarray) -> np.ndarray:
    """Tukey's g-and-h with h = 0.15: symmetric, with tails about those of Student's t with five degrees."""
    return z_TW * np.exp(0.075 * np.square(z_TW))


DIFFERENCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "normal": normal,
    "heavy tails (g-and-h, h 0.15)": heavy,
    "skewed (lognormal, sigma 0.5)": skewed,
}


def rows_of(windows: int, correlation: float, trials: int) -> np.ndarray:
    """Rows [trials, windows] with mean 0 and variance 1."""
    rows_TW = np.random.default_rng(0).standard_normal((trials, windows))
    for k in range(1, windows):
        rows_TW[:, k] = correlation * rows_TW[:, k - 1] + math.sqrt(1 - correlation**2) * rows_TW[:, k]
    return rows_TW


def _around(mean_T: np.ndarray, error_T: np.ndarray, degrees: int) -> Ends:
    half_T = student(degrees) * error_T
    return mean_T - half_T, mean_T + half_T


def of_t(x_TW: np.ndarray) -> Ends:
    windows = x_TW.shape[1]
    return _around(x_TW.mean(1), x_TW.std(1, ddof=1) / math.sqrt(windows), windows - 1)


def estimated(x_TW: np.ndarray) -> Ends:
    windows, mean_T = x_TW.shape[1], x_TW.mean(1)
    apart_TW = x_TW - mean_T[:, None]
    seen_T = (apart_TW[:, 1:] * apart_TW[:, :-1]).sum(1) / np.square(apart_TW).sum(1)
    alike_T = np.clip((windows * seen_T + 1) / (windows - 4), 0, 0.7) if windows >= 8 else np.zeros(len(x_TW))
    error_T = np.sqrt((1 + alike_T) / (1 - alike_T) / windows) * x_TW.std(1, ddof=1)
    t, skewness_T = student(windows - 1), (apart_TW**3).mean(1) / x_TW.std(1, ddof=1) ** 3
    above_T, below_T = (corrected(end, skewness_T, windows) for end in (t, -t))
    return mean_T - error_T * np.maximum(t, above_T), mean_T - error_T * np.minimum(-t, below_T)


def blocks(x_TW: np.ndarray) -> Ends:
    means_TB = x_TW.reshape(len(x_TW), 4, -1).mean(2)
    return _around(means_TB.mean(1), means_TB.std(1, ddof=1) / 2, 3)


def cosines(x_TW: np.ndarray) -> Ends:
    windows = x_TW.shape[1]
    angles_BW = math.pi * np.arange(1, 4)[:, None] * (np.arange(windows) + 0.5) / windows
    variance_T = np.square(x_TW @ np.cos(angles_BW).T).mean(1) * 2 / windows
    return _around(x_TW.mean(1), np.sqrt(variance_T / windows), 3)


METHODS: dict[str, Callable[[np.ndarray], Ends]] = {
    "this": interval_ends,
    "t": of_t,
    "estimated": estimated,
    "blocks": blocks,
    "cosines": cosines,
}


def row(differences: str, windows: int, correlation: float, trials: int = TRIALS) -> dict[str, Any]:
    """Coverage and width of each method."""
    shape, deviates = DIFFERENCES[differences], np.random.default_rng(1).standard_normal(1_000_000)
    x_TW = shape(rows_of(windows, correlation, trials))
    unit = 2 * student(windows - 1) * float(shape(deviates).std()) / math.sqrt(windows)
    found = {name: method(x_TW) for name, method in METHODS.items()}
    return {
        "differences": differences,
        "windows": windows,
        "correlation": correlation,
        "held": {name: round(float(np.mean((low <= 0) & (high >= 0))), 4) for name, (low, high) in found.items()},
        "width": {name: round(float(np.mean(high - low)) / unit, 3) for name, (low, high) in found.items()},
    }


def differs(stored: dict[str, Any], anew: dict[str, Any]) -> bool:
    """Whether a simulated row is not the stored one."""
    return any(abs(stored["held"].get(name, 2) - share) > CLOSE for name, share in anew["held"].items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    rows = [row(d, w, c) for d in DIFFERENCES for w in WINDOWS for c in CORRELATIONS]
    if not check:
        print(json.dumps({"trials": TRIALS, "nominal": 0.95, "rows": rows}, indent=1))
        return 0
    stored = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    wrong = [new for old, new in zip(stored, rows, strict=True) if differs(old, new)]
    print(*map(json.dumps, wrong), sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
