"""Compares what an engine gives with what is expected, and runs its steps so that none goes unseen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nbl_export.acceptance.parts import Opened
from nbl_export.acceptance.verdict import (
    DEFECT,
    KERNELS,
    RUNNER,
    Failed,
    Notes,
)
from nbl_export.errors import NblError
from nbl_export.targets.tensorrt.examine.examined import SPOILT

__all__ = ["advance", "distance", "last_of", "require_close"]


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    """Rms of the difference over rms of the expected values; infinite if anything is not finite."""
    wide = expected.astype(np.float64)
    size = float(np.sqrt(np.square(wide).mean()))
    found = float(np.sqrt(np.square(got - wide).mean()))
    return found / max(size, 1e-30) if np.isfinite(found) else float("inf")


def require_close(notes: Notes, name: str, got: np.ndarray, expected: np.ndarray, limit: float) -> None:
    """Record the distance.

    Raises:
        Failed: it is larger than the limit.
    """
    found = distance(got, expected)
    notes.see(name, found, limit)
    if found > limit:
        seen = "not finite" if not np.isfinite(found) else f"{found:.3g}"
        raise Failed(f"{name}: the relative difference is {seen}, {limit:g} allowed")


def advance(opened: Opened, ids: Sequence[Sequence[int]], counts: Sequence[int] | None = None) -> np.ndarray:
    """Append tokens to all rows; returns the logits [B, V] after each row's last token.

    Args:
        ids: one row of tokens for each row of the batch, all of one length.
        counts: tokens of each row that are no padding; None for all.

    Raises:
        Failed: the step is refused, or wrote no logits, or logits that are not finite.
    """
    ids_BT = np.array(ids, np.int64)
    rows, tokens = ids_BT.shape
    many = [tokens] * rows if counts is None else list(counts)
    valid = (np.arange(tokens)[None] < np.array(many)[:, None]).astype(np.int64)
    what = f"a step of {rows} x {tokens} tokens on {opened.subject}"
    opened.inside.spoil_logits(min(tokens, opened.session.chunk))
    try:
        logits_BV = last_of(opened.decoder.step(ids_BT, valid), many)
    except NblError as error:
        raise Failed(f"{what} is refused: {error}", RUNNER, DEFECT) from error
    if (logits_BV == SPOILT).all():
        raise Failed(f"{what} wrote no logits and reported no error: a refusal of the library was dropped",
                     RUNNER, DEFECT)  # fmt: skip
    bad = int((~np.isfinite(logits_BV)).sum())
    if bad:
        raise Failed(f"{what} gave {bad} of {logits_BV.size} logits that are not finite", KERNELS)
    return logits_BV


def last_of(logits_BTV: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Logits [B, V] of each row's last token, of all logits or of those of last tokens alone."""
    if logits_BTV.shape[1] == 1:
        return logits_BTV[:, 0]
    return logits_BTV[np.arange(len(counts)), [max(0, n - 1) for n in counts]]
