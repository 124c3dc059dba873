"""How many layers at the top of a decoder are windows (`mixers.window`), by the loss on long windows of text.

Windows at the top save most: each layer above another adds W - 1 rows to those that a prompt needs of the other one.
So sets of the top 1, 2, 3, ... layers are tried, a few at once, until the largest of these costs too much. Rows have
`LENGTH` tokens, since a short row would hide what a window does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from nbl_export.mixers.window import Window
from nbl_export.model.mixes import Mixes
from nbl_export.plan.inputs import Maps, Texts
from nbl_export.plan.order import Task, quiet
from nbl_export.plan.planning import most_within
from nbl_export.records.decoder import DecoderSpec

__all__ = ["LENGTH", "long_rows", "top_windows"]

LENGTH = 2048  # tokens of a row, or the model's positions
_AT_ONCE = 4  # sets that share a pass of the original


def long_rows(windows_WT: Any, length: int) -> torch.Tensor:
    """Consecutive windows joined to rows of `length` tokens, the rest left out; the windows if they give no row."""
    ids = torch.as_tensor(windows_WT).flatten()
    rows = len(ids) // length
    return ids[: rows * length].view(rows, length) if rows else torch.as_tensor(windows_WT)


def top_windows(
    spec: DecoderSpec, windows_of: Callable[[Iterable[int]], dict[int, Window]], mixes: Callable[[Maps], Mixes],
    texts: Texts, share: float, task: Task = quiet,
) -> dict[int, Window]:  # fmt: skip
    """The windows of as many top layers as raise perplexity by at most `share` on every text; at most half of them.

    Args:
        windows_of: layers -> their windows. mixes: windows -> the torch model in which they can replace attention.
        texts: consecutive windows of each.

    Raises:
        NblError: a layer's attention has parts that a window does not have.
    """
    count = spec.num_layers
    made = windows_of(range(count - count // 2, count))
    length = min(LENGTH, spec.max_positions)
    rows = [(name, long_rows(windows, length)) for name, windows in texts]
    switched, best = mixes(made), 0
    for least in range(1, count // 2 + 1, _AT_ONCE):
        sets: dict[int, Sequence[int]] = {
            k: range(count - k, count) for k in range(least, min(least + _AT_ONCE, count // 2 + 1))
        }
        best = max(best, most_within(switched, sets, share, rows, task))
        if best < max(sets):
            break
    return {i: made[i] for i in range(count - best, count)}
