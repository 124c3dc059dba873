"""Long-range tokens: tokens that the original predicts from a whole text, and not from the last tokens alone.

    position p predicts token p + 1     S  its loss behind the last 64 to 127 tokens
                                        L  its loss behind the whole text          long-range, if S - L is at least 1

What is lost of them is (loss of NBL - L) / (S - L), summed over a row: 0 is the original, 1 has the recent text alone.
A name from the beginning, an argument of a call, a passage that is repeated: few tokens are long-range, so ordinary
perplexity hardly shows what becomes of them, and people notice it first. Any text has them, so no data set is needed.
Published losses of this kind: LAMBADA (Paperno et al. 2016, arXiv 1606.06031) has last words of passages that nobody
guesses from the last sentence.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["FEWEST", "SHORT", "contexts", "is_long_range"]

FEWEST = 8  # long-range tokens of a row that counts
SHORT = 64  # tokens: the shortest recent context
_GAIN = 1.0  # nats


def contexts(begin: int, end: int) -> np.ndarray:
    """Index [windows, 2 SHORT - 1] of the short contexts of positions `begin` to `end` - 1 of a text.

    The last SHORT positions of window k are `begin` + k SHORT and those behind it; the last window repeats its end.

    Args:
        begin: at least SHORT - 1.
    """
    assert begin >= SHORT - 1
    starts = np.arange(begin, end, SHORT)[:, None] - (SHORT - 1)
    return np.minimum(starts + np.arange(2 * SHORT - 1), end - 1)


def is_long_range(gain: Any) -> Any:
    """Which positions are long-range tokens, from S - L in nats, an array or a tensor."""
    return gain >= _GAIN
