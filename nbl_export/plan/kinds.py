"""Which layers keep their attention over a window (`mixers.window`) instead of a map that is fitted.

    each layer alone ─► change of the last hidden states, once with its map and once with its window ─► its kind

A window costs more than a map: it computes queries, keys and values, and has a cache. Above the last whole attention
both let a prompt end early. So a layer gets a window only if the change is less than half of the map's. Near the
original, KL goes with the square of the change. Rows have `LENGTH` tokens, since a short row would hide what a window
does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from nbl_export.model.mixes import Mixes, quiet
from nbl_export.plan.inputs import Maps, Texts

__all__ = ["LENGTH", "better_as_windows", "long_rows"]

LENGTH = 2048  # tokens of a row, or the model's positions
_TIMES = 2.0  # what a map must change the output by, in units of what the window changes it by


def better_as_windows(
    mixes: Callable[[Maps], Mixes], fitted: Maps, windows: Maps, texts: Texts, length: int,
    progress: Callable[[int, int], None] = quiet,
) -> tuple[int, ...]:  # fmt: skip
    """The layers, of those that have a window, whose window changes the output less than half as much as their map.

    Args:
        mixes: maps -> the torch model in which they can replace attention.
        texts: consecutive windows of each. length: most tokens of a row; one row of each text is read.
    """
    rows = [long_rows(ids, length)[:1] for _, ids in texts]
    total, done = 2 * len(rows) * len(windows), 0
    found: list[dict[int, float]] = []
    for maps in ({i: fitted[i] for i in windows}, windows):
        changes = dict.fromkeys(maps, 0.0)
        for ids_WT in rows:
            for layer, change in _changes(mixes(maps), ids_WT, maps):
                changes[layer] += change
                done += 1
                progress(done, total)
        found.append(changes)
    by_map, by_window = found
    return tuple(i for i in windows if _TIMES * by_window[i] < by_map[i])


def long_rows(windows_WT: Any, length: int) -> torch.Tensor:
    """Consecutive windows joined to rows of `length` tokens, the rest left out; the windows if they give no row."""
    ids = torch.as_tensor(windows_WT).flatten()
    rows = len(ids) // length
    return ids[: rows * length].view(rows, length) if rows else torch.as_tensor(windows_WT)


@torch.no_grad()
def _changes(mixes: Mixes, ids_WT: torch.Tensor, layers: Iterable[int]) -> Iterator[tuple[int, float]]:
    """Each layer, and the mean square change of the last hidden states if it alone is replaced."""
    runs, layers = mixes.runs(ids_WT, again=False), list(layers)
    for layer, last in zip(layers, runs.last([(i,) for i in layers]), strict=True):
        yield layer, (last - runs.original).float().square().mean().item()
