"""Which layers keep their attention over a window (`mixers.window`) instead of a map that is fitted.

    each layer alone ─► KL(original || changed model), once with its map and once with its window ─► its kind

A window costs more than a map: it computes queries, keys and values, and has a cache. Above the last whole attention
both let a prompt end early. So a layer gets a window only if its KL is clearly the lower one. Rows have `LENGTH`
tokens, since a short row would hide what a window does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from nbl_export.model.mixes import Mixes, quiet
from nbl_export.plan.inputs import Maps, Texts

__all__ = ["LENGTH", "better_as_windows", "long_rows"]

LENGTH = 2048  # tokens of a row, or the model's positions
_TIMES = 1.5  # a map's KL over the window's from which on the window is worth its cost
_EVERY = 8  # every eighth position is judged; each position sees all positions before


def better_as_windows(
    mixes: Callable[[Maps], Mixes], fitted: Maps, windows: Maps, texts: Texts, length: int,
    progress: Callable[[int, int], None] = quiet,
) -> tuple[int, ...]:  # fmt: skip
    """The layers, of those that have a window, that lose `_TIMES` as much with their map as with their window.

    Args:
        mixes: maps -> the torch model in which they can replace attention.
        texts: consecutive windows of each. length: most tokens of a row; one row of each text is read.
    """
    rows = [long_rows(ids, length)[:1] for _, ids in texts]
    total, done = 2 * len(rows) * len(windows), 0
    found: list[dict[int, float]] = []
    for maps in ({i: fitted[i] for i in windows}, windows):
        losses = dict.fromkeys(maps, 0.0)
        for ids_WT in rows:
            for layer, kl in _losses(mixes(maps), ids_WT, maps):
                losses[layer] += kl
                done += 1
                progress(done, total)
        found.append(losses)
    by_map, by_window = found
    return tuple(i for i in windows if _TIMES * by_window[i] < by_map[i])


def long_rows(windows_WT: Any, length: int) -> torch.Tensor:
    """Consecutive windows joined to rows of `length` tokens, the rest left out; the windows if they give no row."""
    ids = torch.as_tensor(windows_WT).flatten()
    rows = len(ids) // length
    return ids[: rows * length].view(rows, length) if rows else torch.as_tensor(windows_WT)


def _losses(mixes: Mixes, ids_WT: torch.Tensor, layers: Iterable[int]) -> Iterator[tuple[int, float]]:
    """Each layer, and the KL of a row if it alone is replaced."""
    runs, layers = mixes.runs(ids_WT, again=False), list(layers)
    for layer, last in zip(layers, runs.last([(i,) for i in layers]), strict=True):
        yield layer, mixes.losses(ids_WT[0], runs.original[0], {layer: last[0]}, _EVERY)[layer].kl
