"""Quality loss window by window: perplexity, its increase and KL, each with a 95% interval, and the wording.

    one value a window ─► mean ─► interval                       KL, top-1 agreement
    loss after - loss before, window by window ─► exp(.) - 1     perplexity increase

Windows are few (16 or 32 of 512 tokens), and neighbours can be alike by a correlation that so few windows hardly
show. With a known correlation r of a first-order autoregression, (mean - truth) / error has Student's t distribution.
The interval weighs every r from -0.3 to 0.92 by its likelihood, without the mean and the scale (Zellner and Tiao 1964,
Bayesian Analysis of the Regression Model with Autocorrelated Errors, J. Am. Statist. Assoc. 59). The interval is
symmetric about the mean and contains 95% of the weighed distributions.

Windows of a test with looks (`records.sequential`) are drawn apart. With g - 1 unread windows between two of them,
their correlations end at 0.92^g. The interval of a look contains more than 95%, so that it holds at 95% whichever look
ends the reading.

Losses are also skewed. At each end, the interval takes the wider of this and the same corrected for skewness. The
correction is Hall's (1992, The Removal of Skewness by Transformation, J. R. Statist. Soc. B 54).

`bench/window_intervals.py` simulates how often intervals contain the mean, beside other methods. Its raw result is
`bench/results/coverage-perplexity.json`.

`evaluation.measure` has the standard error of benchmarks, which have hundreds of items.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.records import sequential

__all__ = [
    "CONFIDENCE",
    "FEWEST_PASSAGES",
    "LONG_RANGE_SHARE",
    "MOST_UNSURE",
    "SHORT_TEXT",
    "WARN_RATIO",
    "Interval",
    "describe_increase",
    "describe_interval",
    "describe_kept",
    "describe_long_range",
    "describe_loss",
    "describe_retrieval",
    "grows_with_length",
    "increase_ends",
    "increase_interval",
    "interval_ends",
    "long_range_ends",
    "long_range_row",
    "loss_row",
    "mean_interval",
    "perplexity",
    "promise",
    "retrieval_row",
    "verdict",
    "warn_of_text",
]

CONFIDENCE = 0.95
WARN_RATIO = 2.0  # a warning needs a loss this many times that on another text, or in a short one
SHORT_TEXT = 512  # tokens of a short text
LONG_RANGE_SHARE = 2.0  # of long-range tokens so many times the limit may be lost
FEWEST_PASSAGES = 4  # with long-range tokens, of a text that is judged by them
MOST_UNSURE = 2.0  # perplexity of the original on the answers of a kind of retrieval items that is judged
_NOTICED = 0.05  # no warning below this perplexity increase


# Correlations of neighbouring windows that an interval allows for. A wider range lengthens intervals of few windows.
_LEAST_ALIKE = -0.3
_MOST_ALIKE = 0.92


_FLAT = 1e-9  # skewness below which there is nothing to correct


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its interval. One window gives no ends; values that are not finite give no figure."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> list[float] | None:
        """[low, high] for JSON; None without an interval."""
        return None if self.low is None or self.high is None else [self.low, self.high]


def mean_interval(
    values: Sequence[float] | np.ndarray,
    bounds: tuple[float, float] | None = None,
    looks: Sequence[int] = (),
    *,
    independent: bool = False,
) -> Interval:
    """The mean of one value a window.

    Args:
        bounds: limits of the mean, such as 0 and 1 of a share.
        looks: windows read at the end of each look; none or one if the number of windows was fixed.
        independent: whether windows were drawn independently, and are not of one text.
    """
    x = np.asarray(values, np.float64)
    if not np.isfinite(x).all():
        return Interval(None)
    value = float(x.mean())
    count = len(x)
    if count < 2:
        return Interval(value)
    low, high = (float(end[0]) for end in interval_ends(x[None], looks, independent=independent))
    if bounds is not None:
        low = max(low, bounds[0])
        high = min(high, bounds[1])
    return Interval(value, low, high)


def interval_ends(
    rows_TW: np.ndarray, looks: Sequence[int] = (), *, independent: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Ends [T] of the interval of the mean of each row of at least two windows, in the order of the text.

    looks, independent: see `mean_interval`.
    """
    count = rows_TW.shape[1]
    several = len(looks) > 1
    confidence = sequential.level(tuple(looks)) if several else CONFIDENCE
    apart = max(1.0, looks[-1] / count) if several else 1.0
    alike_R = np.zeros(1) if independent else np.linspace(_LEAST_ALIKE, _MOST_ALIKE**apart, 25)
    mean_T = rows_TW.mean(1)
    apart_TW = rows_TW - mean_T[:, None]
    spread_T = rows_TW.std(1, ddof=1)
    skewness_T = np.divide((apart_TW**3).mean(1), spread_T**3, out=np.zeros(len(rows_TW)), where=spread_T > 0)
    t = _student(count - 1, confidence)
    error_T = _half_widths(apart_TW, confidence, alike_R) / t
    low_T = mean_T - error_T * np.maximum(t, _corrected(t, skewness_T, count))
    return low_T, mean_T - error_T * np.minimum(-t, _corrected(-t, skewness_T, count))


def increase_interval(
    before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray, looks: Sequence[int] = ()
) -> Interval:
    """Relative increase of perplexity, from losses in nats of the same windows.

    Losses are paired, so the difficulty of a window cancels out. `looks`: see `mean_interval`.
    """
    rise = mean_interval(np.asarray(after, np.float64) - np.asarray(before, np.float64), looks=looks)
    return Interval(*(_raised(v) for v in (rise.value, rise.low, rise.high)))


def describe_interval(
    value: float | None, ends: Sequence[Any] | None, *, percent: bool = False, sign: bool = False
) -> str:
    """A figure with as many digits as its interval supports, and the interval: "+45% (38 to 52)".

    Half the interval keeps one digit, or two if the first digit is 1.
    """
    if value is None or not math.isfinite(value):
        return "not finite"
    scale = 100 if percent else 1
    mark = "+" if sign else ""
    unit = "%" if percent else ""
    half = scale * (ends[1] - ends[0]) / 2 if ends else 0.0
    places = _places(half) if half > 0 else _places(abs(scale * value) / 10)

    def shown(v: float) -> str:
        return f"{scale * v:.{places}f}"

    text = f"{scale * value:{mark}.{places}f}{unit}"
    return (f"{text} ({shown(ends[0])} to {shown(ends[1])})" if ends else text).replace("-", "−")


def _places(half: float) -> int:
    """Decimals that show one digit of `half`, or two if the first digit is 1."""
    if half <= 0 or not math.isfinite(half):
        return 0
    power = math.floor(math.log10(half))
    return min(9, max(0, (1 if half < 2 * 10**power else 0) - power))


def _raised(loss: float | None) -> float | None:
    return None if loss is None or loss > 700 else math.expm1(loss)


def _corrected(t: float, skewness_T: np.ndarray, count: int) -> np.ndarray:
    """The quantile of (mean - truth) / error, with skewness corrected by Hall's cubic."""
    flat_T = np.abs(skewness_T) < _FLAT
    a_T = np.where(flat_T, 1.0, skewness_T) / math.sqrt(count)
    return np.where(flat_T, t, 3 / a_T * (np.cbrt(1 + a_T * (t - a_T / 6)) - 1))


def _half_widths(apart_TW: np.ndarray, confidence: float, alike_R: np.ndarray) -> np.ndarray:
    """Half the interval [T] around the mean of each row, from the distances of its windows to the mean."""
    weight_RT, shift_RT, scale_RT = _weighed(apart_TW, alike_R)
    degrees = apart_TW.shape[1] - 1
    low_T = np.zeros(len(apart_TW))
    high_T = (np.abs(shift_RT) + _student(degrees, confidence) * scale_RT).max(0)
    for _ in range(40):
        half_T = (low_T + high_T) / 2
        ends = (np.arctan((side * half_T - shift_RT) / scale_RT / math.sqrt(degrees)) for side in (1, -1))
        above_RT, below_RT = (_inside(angle_RT, degrees) for angle_RT in ends)
        short_T = (weight_RT * (above_RT - below_RT)).sum(0) / 2 < confidence
        low_T = np.where(short_T, half_T, low_T)
        high_T = np.where(short_T, high_T, half_T)
    return np.where(apart_TW.any(1), high_T, 0.0)


def _weighed(apart_TW: np.ndarray, alike_R: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each correlation: its weight, and shift and scale of truth - mean, which has Student's t distribution.

    The inverse of r^|i - j| has three diagonals. So all follow from sums of squares and of neighbours' products.
    """
    count = apart_TW.shape[1]
    r_R1 = alike_R[:, None]
    ends_T = apart_TW[:, 0] + apart_TW[:, -1]
    squares_T = np.square(apart_TW).sum(1)
    inner_T = squares_T - np.square(apart_TW[:, 0]) - np.square(apart_TW[:, -1])
    products_T = (apart_TW[:, 1:] * apart_TW[:, :-1]).sum(1)
    effective_R1 = (count - (count - 2) * r_R1) / (1 + r_R1)
    shift_RT = r_R1 * ends_T / (count - (count - 2) * r_R1)
    residual_RT = (squares_T + r_R1**2 * inner_T - 2 * r_R1 * products_T) / (1 - r_R1**2) - effective_R1 * shift_RT**2
    residual_RT = np.maximum(residual_RT, np.finfo(float).tiny)  # equal windows
    log_RT = -(count - 1) / 2 * np.log((1 - r_R1**2) * residual_RT) - np.log(effective_R1) / 2
    weight_RT = np.exp(log_RT - log_RT.max(0))
    return weight_RT / weight_RT.sum(0), shift_RT, np.sqrt(residual_RT / ((count - 1) * effective_R1))


@functools.cache
def _student(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The two-sided quantile of Student's t."""
    low = 0.0
    high = math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _inside(angle, degrees) < confidence else (low, angle)
    return math.tan(low) * math.sqrt(degrees)


def _inside(angle: Any, degrees: int) -> Any:
    """P(|T| < tan(angle) sqrt(degrees)), negative for a negative angle (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    odd = degrees % 2
    squared = np.cos(angle) ** 2
    term = np.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(odd, degrees - 1, 2):
        total = total + term
        term = term * ((power + 1) / (power + 2)) * squared
    return 2 / math.pi * (angle + np.sin(angle) * total) if odd else np.sin(angle) * total


def describe_loss(row: Mapping[str, Any]) -> dict[str, str]:
    """Increase, KL and top-1 agreement of a quality row (`verify.perplexity.quality_loss`) in words, with intervals."""
    return {
        "increase": describe_interval(row["increase"], row["increase_interval"], percent=True, sign=True),
        "kl": describe_interval(row["kl_mean"], row["kl_interval"]),
        "top1": describe_interval(row["top1_agreement"], row["top1_interval"], percent=True),
    }


def perplexity(losses: np.ndarray) -> float | None:
    """exp(mean loss); None if it is not finite."""
    mean = float(losses.mean())
    return math.exp(mean) if mean < 700 else None  # None for NaN too


def loss_row(name: str, losses: Sequence[Any]) -> dict[str, Any]:
    """Quality loss of a replaced set in torch on one text; None if not finite.

    Args:
        losses: one `methods.losses.Loss` for each window.
    """
    before, after, kl = (
        np.array([getattr(loss, total) / loss.positions for loss in losses])
        for total in ("original_sum", "nbl_sum", "kl_sum")
    )
    increase = increase_interval(before, after)
    apart = mean_interval(kl, (0.0, math.inf))
    return {
        "text": name,
        "tokens": sum(loss.positions + 1 for loss in losses),
        "windows": len(losses),
        "kl": apart.value,
        "kl_interval": apart.ends,
        "perplexity_original": perplexity(before),
        "perplexity": perplexity(after),
        "increase": increase.value,
        "increase_interval": increase.ends,
    }


def describe_increase(row: Mapping[str, Any]) -> str:
    """The increase of perplexity of a `loss_row` in words."""
    if row["increase"] is None:
        return "infinitely much"
    return describe_interval(row["increase"], row["increase_interval"], percent=True, sign=True)


def long_range_row(
    name: str, found: Sequence[tuple[int, float, float, float]], looks: Sequence[int] = (), *, independent: bool = False
) -> dict[str, Any]:
    """What is lost of a text's long-range tokens (`text.long_range`), each passage as much as another one.

    Args:
        found: of each passage the number of long-range tokens, and sums in nats: loss of the original, of NBL, and
            S - L.
        looks, independent: see `mean_interval`.
    """
    count, before, after, gain = np.array(found, np.float64).T
    lost = mean_interval((after - before) / gain, looks=looks, independent=independent)
    return {
        "text": name,
        "tokens": int(count.sum()),
        "windows": len(found),
        "perplexity_original": perplexity(before / count),
        "perplexity_nbl": perplexity(after / count),
        "lost": lost.value,
        "lost_interval": lost.ends,
        "looks": list(looks),
        "per_window": {
            "answers": count.tolist(),
            "loss_original": before.tolist(),
            "loss_nbl": after.tolist(),
            "gain": gain.tolist(),
        },
    }


def retrieval_row(name: str, found: Sequence[tuple[int, float, float, float]]) -> dict[str, Any]:
    """What is lost of the answers of one kind of retrieval items (`text.retrieval`), as `long_range_row` has it.

    "judged": whether the original finds the answers, by a perplexity of at most `MOST_UNSURE`; else they tell nothing.

    Args:
        found: none if no row has enough answers that the context helps with.
    """
    if not found:
        return {"text": name, "tokens": 0, "windows": 0, "lost": None, "lost_interval": None, "judged": False}
    row = long_range_row(name, found, independent=True)
    return {**row, "judged": (row["perplexity_original"] or math.inf) <= MOST_UNSURE}


def verdict(ends: Sequence[float] | None, share: float) -> str:
    """Whether an interval shows that a loss is "within" a limit or "beyond" it; else "undecided"."""
    low, high = (-math.inf, math.inf) if ends is None else ends
    return "within" if high <= share else "beyond" if low > share else "undecided"


def increase_ends(row: Mapping[str, Any]) -> Sequence[float] | None:
    """Ends of the interval of an increase of perplexity, infinite if not finite; None of a single window."""
    return (math.inf, math.inf) if row["increase"] is None else row["increase_interval"]


def long_range_ends(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Ends of the interval of a `long_range_row`, infinite if not finite; None if its passages are too few to judge."""
    if row["lost"] is None:
        return math.inf, math.inf
    if row["windows"] < FEWEST_PASSAGES or row["lost_interval"] is None:
        return None
    low, high = row["lost_interval"]
    return low, high


def describe_long_range(row: Mapping[str, Any]) -> str:
    """A `long_range_row`: "long-range tokens keep 95% (93 to 97) of what long-range context gives them, on a text"."""
    if row["lost"] is None:
        return f"what long-range tokens lose is not finite, on {row['text']}"
    return f"long-range tokens {_kept_on(row)}"


def describe_kept(row: Mapping[str, Any]) -> str:
    """What a `long_range_row` keeps: "95% (93 to 97)"."""
    if row["lost"] is None:
        return "not finite"
    ends = row["lost_interval"] and [1 - end for end in reversed(row["lost_interval"])]
    return describe_interval(1 - row["lost"], ends, percent=True)


def describe_retrieval(row: Mapping[str, Any]) -> str:
    """A `retrieval_row` in words: "answers keep 99% (98 to 100) of what long-range context gives them, on ..."."""
    if not row["judged"]:
        return f"{row['text']} is not judged: the original finds too few answers"
    return f"answers {_kept_on(row)}"


def _kept_on(row: Mapping[str, Any]) -> str:
    few = "" if long_range_ends(row) else f" ({row['windows']} passages, too few to judge)"
    return f"keep {describe_kept(row)} of what long-range context gives them, on {row['text']}{few}"


def promise(share: float, *, items: bool = True) -> str:
    """What a limit on quality allows, in the words of report and docs.

    Args:
        items: whether retrieval items were judged.
    """
    said = (
        f"Perplexity rises by at most {share:.0%} on text like yours and on a second text. Long-range tokens "
        f"of each text keep at least {1 - LONG_RANGE_SHARE * share:.0%} of what long-range context gives them."
    )
    return f"{said} So do the answers of retrieval items that the original finds." if items else said


def warn_of_text(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """One sentence if the largest perplexity increase is more than `WARN_RATIO` times the smallest; else None.

    If both increases have intervals, the intervals must also be disjoint.

    Args:
        rows: one of `verify.perplexity.quality_loss` for each text.
    """
    rows = [row for row in rows if row["increase"] is not None]
    if len(rows) < 2:
        return None
    least, most = (pick(rows, key=lambda row: row["increase"]) for pick in (min, max))
    low = least["increase"]
    high = most["increase"]
    if high < _NOTICED or high <= WARN_RATIO * low:
        return None
    ends = least["increase_interval"], most["increase_interval"]
    if all(ends) and ends[0][1] >= ends[1][0]:
        return None
    small, large = (describe_loss(row)["increase"] for row in (least, most))
    return (
        f"the perplexity increase depends on the text: {small} on {least['text']}, but {large} on {most['text']}; "
        "judge by the text that you will run, and calibrate on text like it or on more texts (repeat --calibration)"
    )


def grows_with_length(short_W: np.ndarray, long_W: np.ndarray) -> bool:
    """Whether the loss rises `WARN_RATIO` times as much at length as in a short text, and enough to be noticed.

    The interval of the rise at length - `WARN_RATIO` * the rise in a short text, item by item, must be above zero.

    Args:
        short_W, long_W: loss after minus loss before of each window, key or sequence, in nats.
    """
    rise = mean_interval(long_W)
    apart = mean_interval(long_W - WARN_RATIO * short_W)
    return rise.value is not None and rise.value >= math.log1p(_NOTICED) and apart.low is not None and apart.low > 0
