"""Attention over the last W tokens and the first one: its shape, its rotary tables, and its NumPy form.

    row of the state    0             1 .. W               behind them, the rows of this step
    holds               first token   the W tokens before  q is not kept
    numbers of a row    keys (not rotated), values, and a mark: 1 if the row holds a token

A token reads the W rows up to its own. The row in front of these is not read. Its mark says whether the first token has
left the window: then the first row is read too, as if it stood W tokens back. So a state says all that a step needs,
and no position of the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["WindowShape", "attend", "rotary_tables", "swapped"]


@dataclass(frozen=True)
class WindowShape:
    """W, the heads of queries and of keys, the numbers of a head, and the factor of scores."""

    tokens: int
    heads: int
    kv_heads: int
    head_size: int
    scale: float

    @property
    def query_width(self) -> int:
        return self.heads * self.head_size

    @property
    def key_width(self) -> int:
        return self.kv_heads * self.head_size


def rotary_tables(positions_P: np.ndarray, frequencies: np.ndarray, head_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and signed sines [P, head_size]: a rotated head h is h * cosine + h[swapped] * sine."""
    angles = np.outer(positions_P.astype(np.float64), frequencies.astype(np.float64))
    rest = head_size - 2 * angles.shape[1]
    cosine = np.concatenate([np.cos(angles)] * 2 + [np.ones((len(angles), rest))], 1)
    sine = np.concatenate([-np.sin(angles), np.sin(angles), np.zeros((len(angles), rest))], 1)
    return cosine.astype(np.float32), sine.astype(np.float32)


def swapped(pairs: int, head_size: int) -> np.ndarray:
    """Index [head_size] of each number's partner: i and i + pairs; the rest stay."""
    index = np.arange(head_size)
    return np.concatenate([index[pairs : 2 * pairs], index[:pairs], index[2 * pairs :]])


def attend(
    qkv_BTE: np.ndarray, past_BSK: np.ndarray, shape: WindowShape, frequencies: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the heads make of these tokens [B, T, Q], and the state behind them. No row is padding."""
    (batch, count), tokens = qkv_BTE.shape[:2], shape.tokens
    marked = np.concatenate([qkv_BTE, np.ones((batch, count, 1), np.float32)], 2)
    first, before = past_BSK[:, :1], past_BSK[:, 1:]
    first = np.where(first[..., -1:] > 0, first, marked[:, :1, shape.query_width :])
    rows = np.concatenate([before, marked[..., shape.query_width :]], 1)
    back_TR = tokens + np.arange(count)[:, None] - np.arange(tokens + count)
    mark_BR = rows[..., -1] > 0
    seen_BTR = (back_TR >= 0) & (back_TR < tokens) & mark_BR[:, None]
    left_BT = mark_BR[:, :count]  # a row stands in front of this token's window

    def heads_of(value: np.ndarray, count: int) -> np.ndarray:
        return value.reshape(*value.shape[:2], count, shape.head_size).swapaxes(1, 2)

    def rotated(value: np.ndarray, positions: np.ndarray) -> np.ndarray:
        cosine, sine = rotary_tables(positions, frequencies, shape.head_size)
        turned: np.ndarray = value * cosine + value[..., swapped(len(frequencies), shape.head_size)] * sine
        return turned

    groups = shape.heads // shape.kv_heads
    q = heads_of(marked[..., : shape.query_width], shape.heads) * np.float32(shape.scale)
    keys, values, first_key, first_value = (
        heads_of(part, shape.kv_heads).repeat(groups, 1)
        for both in (rows, first)
        for part in np.split(both[..., :-1], 2, axis=2)
    )
    places = np.arange(tokens + count)
    scores = rotated(q, places[tokens:]) @ rotated(keys, places).swapaxes(2, 3)
    scores = np.where(seen_BTR[:, None], scores, -np.inf)
    far = np.where(left_BT[:, None, :, None], q @ rotated(first_key, np.array([-tokens])).swapaxes(2, 3), -np.inf)
    scores = np.concatenate([scores, far], 3)
    scores = np.exp(scores - scores.max(3, keepdims=True))
    scores /= scores.sum(3, keepdims=True)
    out = scores[..., :-1] @ values + scores[..., -1:] * first_value
    return out.swapaxes(1, 2).reshape(batch, count, -1), np.concatenate([first, rows[:, -tokens:]], 1)
