"""Whether the price of the replacement is much the same on all texts, or a fit is good on its own kind of text only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["FAR", "warn_of_far_prices"]

FAR = 2.0  # times the increase of perplexity on another text
_NOTICED = 0.05  # below this increase nobody is warned: a few thousand tokens say no more


def warn_of_far_prices(prices: Sequence[Mapping[str, Any]]) -> str | None:
    """One sentence where the largest increase of perplexity is more than `FAR` times the smallest; else None.

    Args:
        prices: rows of `verify.price`: text, perplexity_original, perplexity_nbl.
    """
    increases = [(row["perplexity_nbl"] / row["perplexity_original"] - 1, row["text"]) for row in prices]
    if len(increases) < 2:
        return None
    (low, cheap), (high, dear) = min(increases), max(increases)
    if high < _NOTICED or high <= FAR * low:
        return None
    return (
        f"the price differs by text: perplexity {low:+.0%} on {cheap}, but {high:+.0%} on {dear}; judge by the text "
        "that you will run, and calibrate on more varied text (--calibration, several times) or more like it"
    )
