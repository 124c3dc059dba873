"""The outcome of one model on one task, with a score for every item: standard errors, and a text in windows.

Every figure is a smooth function of means over items. To first order, item i changes the figure by u_i / n, with the
influence u_i (delta method; for ratios Cochran, Sampling Techniques, chapter 6):

    standard error            sd(u) / sqrt(n)
    of a paired difference    sd(u_a - u_b) / sqrt(n)

If both models find the same items hard, the paired error is much smaller than the two single errors combined.

A text is read in windows that do not overlap, as in the perplexity of `verify`:

    tokens    0 1 2 3 4 5 6 7 8 9 ...          context 5
    window 0  . p p p p                        . is read, p is read and scored
    window 1            . p p p p              (the first token of a window is never scored: it has no context)

Documents are tokenised and joined as for calibration. Tokens that do not fill the last window are dropped.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.errors import NblError
from nbl_export.evaluation.scorer import GraphScorer, Request
from nbl_export.text.corpus import READ_BYTES, Corpus
from nbl_export.text.windows import token_ids

__all__ = ["AGGREGATIONS", "Metric", "Outcome", "aggregate_with_stderr", "paired_difference", "run_windows", "windows"]


@dataclass(frozen=True)
class Metric:
    """A figure of a task. `items` [n] or [n, 2] are empty if the aggregation has no error formula."""

    value: float
    stderr: float | None
    aggregation: str
    higher_is_better: bool
    items: tuple[Any, ...]

    @classmethod
    def of(cls, aggregation: str, items: Sequence[Any], *, higher_is_better: bool) -> Metric:
        """The figure of an aggregation over items."""
        return cls(*aggregate_with_stderr(aggregation, items), aggregation, higher_is_better, tuple(items))


@dataclass(frozen=True)
class Outcome:
    """The result of one model on one task."""

    items: int
    metrics: dict[str, Metric]


def run_windows(
    windows: Sequence[list[int]], scorer: GraphScorer, progress: Callable[[int, int], None], prompt: int = 1
) -> Outcome:
    """Perplexity over windows of token ids: exp of the mean loss of all tokens behind the first ones of each window.

    Args:
        prompt: tokens of a window that are read and not scored.
    """
    items: list[tuple[float, int]] = []
    for ids in windows:
        scores = scorer.token_scores(Request(tuple(ids[:prompt]), tuple(ids[prompt:])))
        items.append((float(scores.loglikelihoods.sum()), len(ids) - prompt))
        progress(len(items), len(windows))
    metrics = {"token_perplexity": Metric.of("weighted_perplexity", items, higher_is_better=False)}
    return Outcome(len(items), metrics)


# -- standard errors ---------------------------------------------------------------------------------------------


def _perplexity(loglikelihood: float) -> tuple[float, float]:
    return math.exp(-loglikelihood), -math.exp(-loglikelihood)


# Aggregations by the harness' names: value and slope at the mean of items [n], or at the ratio of the sums of items
# [n, 2], whose second column is a weight (words, bytes or tokens).
AGGREGATIONS: dict[str, Callable[[float], tuple[float, float]]] = {
    "mean": lambda mean: (mean, 1.0),
    "perplexity": _perplexity,
    "weighted_perplexity": _perplexity,
    "bits_per_byte": lambda ratio: (-ratio / math.log(2), -1 / math.log(2)),
}


def aggregate_with_stderr(aggregation: str, items: Any) -> tuple[float, float | None]:
    """The value of an aggregation over items, and its standard error; None for a single item."""
    value, influence = _influence(aggregation, items)
    return value, _error(influence)


def paired_difference(aggregation: str, new: Any, old: Any) -> tuple[float, float | None]:
    """New minus old over the same items in the same order, and its standard error.

    Raises:
        ValueError: the numbers of items differ.
    """
    if len(new) != len(old):
        raise ValueError(f"{len(new)} items are not paired with {len(old)}")
    (a, u), (b, v) = (_influence(aggregation, items) for items in (new, old))
    return a - b, _error(u - v)


def _influence(aggregation: str, items: Any) -> tuple[float, np.ndarray]:
    rows = np.asarray(items, np.float64)
    sums, weights = (rows[:, 0], rows[:, 1]) if rows.ndim == 2 else (rows, np.ones(len(rows)))
    ratio = float(sums.sum() / weights.sum())
    value, slope = AGGREGATIONS[aggregation](ratio)
    return value, slope * (sums - ratio * weights) / weights.mean()


def _error(influence: np.ndarray) -> float | None:
    n = len(influence)
    return float(influence.std(ddof=1) / math.sqrt(n)) if n > 1 else None


# -- texts -----------------------------------------------------------------------------------------------------


def windows(text: Corpus, tokenizer: Any, context: int, limit: int | None) -> list[list[int]]:
    """Token ids of each window; at most `limit` windows.

    Raises:
        NblError: the text is shorter than one window, or the windows need more of the text than was read.
    """
    enough = sys.maxsize if limit is None else context * limit
    ids = token_ids(text, tokenizer, enough)
    if text.truncated and len(ids) < enough:
        raise NblError(f"of the text {text.name} only the first {READ_BYTES >> 20} MiB are read; give --limit")
    starts = range(0, len(ids) - context + 1, context)[:limit]
    if not starts:
        raise NblError(
            f"the text {text.name} has {len(ids)} tokens, fewer than one window of {context}; "
            "give more text or a smaller --ppl-context"
        )
    return [ids[start : start + context] for start in starts]
