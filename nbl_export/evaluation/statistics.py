"""Standard errors of a benchmark's figure, and of the difference of two figures on the same items.

Every figure is a smooth function of means over items. To first order, item i changes the figure by u_i / n, with the
influence u_i (delta method; for ratios Cochran, Sampling Techniques, chapter 6):

    standard error            sd(u) / sqrt(n)
    of a paired difference    sd(u_a - u_b) / sqrt(n)

If both models find the same items hard, the paired error is much smaller than the two single errors combined.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["AGGREGATIONS", "Difference", "Figure", "difference", "figure"]


@dataclass(frozen=True)
class Figure:
    """A value and its standard error; None for a single item."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Difference:
    """New minus old on the same items, and its standard error."""

    value: float
    stderr: float | None


def _mean(items: np.ndarray) -> tuple[float, np.ndarray]:
    return float(items.mean()), items


def _perplexity(items: np.ndarray) -> tuple[float, np.ndarray]:
    """exp(-mean log-likelihood)."""
    value = math.exp(-float(items.mean()))
    return value, -value * items


def _loss_a_unit(items: np.ndarray) -> tuple[float, np.ndarray]:
    """-sum(log-likelihood) / sum(weight), for rows (log-likelihood, weight)."""
    value = -float(items[:, 0].sum() / items[:, 1].sum())
    return value, (-items[:, 0] - value * items[:, 1]) / items[:, 1].mean()


def _weighted_perplexity(items: np.ndarray) -> tuple[float, np.ndarray]:
    loss, influence = _loss_a_unit(items)
    return math.exp(loss), math.exp(loss) * influence


def _bits(items: np.ndarray) -> tuple[float, np.ndarray]:
    loss, influence = _loss_a_unit(items)
    return loss / math.log(2), influence / math.log(2)


# Aggregations by the harness' names. Items [n], or [n, 2] with a weight (words, bytes or tokens).
AGGREGATIONS: dict[str, Callable[[np.ndarray], tuple[float, np.ndarray]]] = {
    "mean": _mean,
    "perplexity": _perplexity,
    "weighted_perplexity": _weighted_perplexity,
    "bits_per_byte": _bits,
}


def figure(aggregation: str, items: Any) -> Figure:
    """The value of an aggregation over items, with its standard error."""
    value, influence = AGGREGATIONS[aggregation](np.asarray(items, np.float64))
    return Figure(value, _error(influence))


def difference(aggregation: str, new: Any, old: Any) -> Difference:
    """New minus old over the same items in the same order.

    Raises:
        ValueError: the numbers of items differ.
    """
    if len(new) != len(old):
        raise ValueError(f"{len(new)} items are not paired with {len(old)}")
    (a, u), (b, v) = (AGGREGATIONS[aggregation](np.asarray(items, np.float64)) for items in (new, old))
    return Difference(a - b, _error(u - v))


def _error(influence: np.ndarray) -> float | None:
    n = len(influence)
    return float(influence.std(ddof=1) / math.sqrt(n)) if n > 1 else None
