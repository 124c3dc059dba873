"""Check quality, the quality loss of the replacement: perplexity increase, KL and top-1 agreement, window by window.

    windows ─► logits of both graphs ─► loss, KL and agreement of each position ─► mean of each window ─► figure and 95%
               short contexts of the original ─► long-range tokens (`text.long_range`) ───^                  interval

If a prompt stops at an exit layer, the first half of a window is the prompt, which stops as it does in use. The
second half is scored. It is appended in steps that continue as a whole, so each of its positions has logits. The
original is scored on the same positions.

If a text has looks (`records.sequential`), its reading ends at the first look that shows whether the loss is within the
limit, or at which another text's is beyond it.

Reported, not gated. A pass over the vocabulary computes in float32, a few rows at a time; sums are float64.
Decoders that do not fit into memory together take turns (`in_turn`): one reads as many windows as may be held.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nbl_export.errors import NblError
from nbl_export.records.quality import (
    LONG_RANGE_SHARE,
    increase_ends,
    increase_interval,
    long_range_ends,
    long_range_row,
    mean_interval,
    perplexity,
    verdict,
)
from nbl_export.records.sequential import order_of
from nbl_export.text.long_range import FEWEST, SHORT, contexts, is_long_range
from nbl_export.text.windows import TWICE

__all__ = ["in_turn", "quality_loss"]

# Of a batch of windows. Two windows at once take about a tenth less time than one by one (SmolLM2, float32). The
# logits of 512 tokens with a vocabulary of 49,152 are 100 MB, and both graphs have some at a time.
_STEP_TOKENS = 1024
_STEP_BYTES = 1 << 28
_ROW_BYTES = 1 << 19  # of logits processed at once, so that they fit in a processor cache
_PART_ROWS = 64  # that a thread compares; numpy computes without the interpreter's lock

Spread = Callable[..., Iterable[np.ndarray]]  # `map`, or a pool's


def quality_loss(
    original: Any,
    nbl: Any,
    texts: Sequence[tuple[str | None, np.ndarray]],
    progress: Callable[[int, int], None],
    continuing: int | None = None,
    *,
    answers: bool = True,
    held: int = 0,
    looks: Mapping[str | None, tuple[int, ...]] | None = None,
    limit: float = math.inf,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Perplexity of both graphs, its increase, KL(original || NBL) in nats and top-1 agreement on each text.

    Args:
        texts: name and token ids [windows, context]. Without a name, only long-range tokens in the second half count.
        continuing: W, if prompts of `nbl` stop at an exit layer. answers: whether long-range tokens are judged.
        held: bytes of the original's logits that may be kept until `nbl` reads the same windows; 0 is one batch.
        looks: of a text by name, windows read at the end of each look; all windows at once of another text.
        limit: most increase of perplexity, which looks decide.

    Returns:
        one row a text, and one of its long-range tokens (`records.quality.long_range_row`). Intervals are [low, high],
        computed from "per_window" and "looks", and None for a single window. "prompt": tokens of a window that are
        not scored, with `continuing`.
    """
    plans = [(looks or {}).get(name, (len(windows),)) for name, windows in texts]
    total = sum(plan[0] for plan in plans)
    done = 0
    rows: list[dict[str, Any]] = []
    long_range: list[dict[str, Any]] = []
    verdicts: list[str] = []  # of texts whose reading ended
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (name, windows), plan in zip(texts, plans, strict=True):
            reader = _Reader(original, nbl, windows, continuing, name is not None, held, pool.map)
            order = order_of(len(windows), plan)
            for look, size in enumerate(plan):
                total += size - plan[look - 1] if look else 0
                while len(reader.found) < size:
                    before = len(reader.found)
                    reader.read(order[before:size], answers=answers)
                    done += len(reader.found) - before
                    progress(done, total)
                row, far = reader.rows(name, plan)
                said = _verdicts(row, far, limit)
                if "undecided" not in said or "beyond" in (*said, *verdicts):
                    break
            verdicts += said
            rows += [] if row is None else [row]
            long_range += [] if far is None else [far]
    return rows, long_range


def _verdicts(row: Mapping[str, Any] | None, far: Mapping[str, Any] | None, limit: float) -> list[str]:
    """What a text's perplexity and its long-range tokens show, if there are enough of these."""
    found = [] if row is None else [verdict(increase_ends(row), limit)]
    ends = None if far is None else long_range_ends(far)
    return found if ends is None else [*found, verdict(ends, LONG_RANGE_SHARE * limit)]


@dataclass
class _Reader:
    """Reads windows of one text with both decoders.

    Attributes:
        whole: whether every position is scored; else, or with `continuing`, the second half of a window.
        found: by window, means of its positions (`_compare`).
    """

    original: Any
    nbl: Any
    windows: np.ndarray
    continuing: int | None
    whole: bool
    held: int
    spread: Spread
    found: dict[int, np.ndarray] = field(default_factory=dict)
    _passages: dict[int, tuple[int, float, float, float]] = field(default_factory=dict)
    _batch: int = 1
    _together: int = 1

    def read(self, order: Sequence[int], *, answers: bool) -> None:
        """Read the first of these windows, as many as fit together."""
        chosen = list(order[: self._together])
        ids_WT = self.windows[chosen]
        tokens = ids_WT.shape[1]
        scored = tokens - (1 if self.whole and self.continuing is None else max(1, tokens // 2))
        base, row_bytes = _read(self.original, ids_WT, self._batch, scored)
        short = [
            _short(self.original, ids_T, scored, row_bytes, self.spread) if answers else np.empty(0) for ids_T in ids_WT
        ]
        parts = _compared(self.nbl, ids_WT, base, self.continuing, self.spread)
        for window, short_N, part_T4 in zip(chosen, short, parts, strict=True):
            self.found[window] = part_T4.mean(0)
            passage = _long_range(short_N, part_T4) if answers else None
            if passage:
                self._passages[window] = passage
        window_bytes = row_bytes * (tokens - 1)
        if self.continuing is None:  # else one: ONNX Runtime takes a chunk behind a cache for a single sequence
            self._batch = max(1, min(_STEP_TOKENS // tokens, _STEP_BYTES // window_bytes))
        self._together = max(self._batch, self.held // window_bytes)

    def rows(self, name: str | None, looks: tuple[int, ...]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The row of the text if it has a name, and that of its long-range tokens if there are any."""
        found = [self.found[window] for window in sorted(self.found)]
        passages = [self._passages[window] for window in sorted(self._passages)]
        row = None
        if name is not None:
            row = _row(name, self.windows.shape[1] * len(found), found, looks)
            row |= {} if self.continuing is None else {"prompt": self.windows.shape[1] // 2}
        return row, long_range_row(TWICE if name is None else name, passages, looks) if passages else None


def in_turn(original: Callable[[], Any], nbl: Callable[[], Any]) -> tuple[Any, Any]:
    """Two decoders of which one is open at a time: each opens at `begin`, which closes the other."""
    first = _InTurn(original)
    second = _InTurn(nbl)
    first.other = second
    second.other = first
    return first, second


class _InTurn:
    other: _InTurn

    def __init__(self, opener: Callable[[], Any]) -> None:
        self._opener: Callable[[], Any] = opener
        self._decoder: Any = None

    def begin(self, batch: int) -> None:
        self.other._decoder = None
        self._decoder = self._decoder or self._opener()
        self._decoder.begin(batch)

    def step(self, ids_BT: np.ndarray) -> np.ndarray:
        assert self._decoder is not None
        logits: np.ndarray = self._decoder.step(ids_BT)
        return logits


def _read(original: Any, ids_WT: np.ndarray, batch: int, scored: int) -> tuple[list[np.ndarray], int]:
    """The original's logits [B, scored, V] of each batch of windows, and the bytes of a position's logits."""
    base = [_logits(original, ids_WT[start : start + batch]) for start in range(0, len(ids_WT), batch)]
    return [base_BTV[:, -scored:] for base_BTV in base], base[0][0, 0].nbytes


def _compared(
    nbl: Any, ids_WT: np.ndarray, base: Sequence[np.ndarray], continuing: int | None, spread: Spread
) -> list[np.ndarray]:
    """What `_compare` finds at the positions of each window that the original was read at."""
    found = list[np.ndarray]()
    prompt = ids_WT.shape[1] // 2
    for base_BTV in base:
        ids_BT = ids_WT[len(found) : len(found) + len(base_BTV)]
        scored = base_BTV.shape[1]
        ours_BTV = _logits(nbl, ids_BT) if continuing is None else _behind_prompt(nbl, ids_BT, prompt, continuing + 1)
        both = zip(base_BTV, ours_BTV[:, -scored:], ids_BT[:, -scored:], strict=True)
        found += [_compare(base_TV, ours_TV, ids_T, spread) for base_TV, ours_TV, ids_T in both]
    return found


def _short(original: Any, ids_T: np.ndarray, scored: int, row_bytes: int, spread: Spread) -> np.ndarray:
    """The original's loss in short contexts, at the last scored positions that have one.

    Args:
        row_bytes: of a position's logits.
    """
    end = len(ids_T) - 1
    begin = max(SHORT - 1, end - scored)
    if begin >= end:
        return np.empty(0)
    rows_WT = ids_T[contexts(begin, end)]
    step = max(1, _STEP_BYTES // (2 * SHORT * row_bytes))
    short: list[np.ndarray] = []
    for start in range(0, len(rows_WT), step):
        part_WT = rows_WT[start : start + step]
        original.begin(len(part_WT))
        logits_WTV = original.step(part_WT)[:, SHORT - 1 :]
        first = begin + SHORT * start
        targets_N = ids_T[first + 1 : min(first + SHORT * len(part_WT), end) + 1]
        logits_NV = logits_WTV.reshape(-1, logits_WTV.shape[2])[: len(targets_N)]
        short += [_compare(logits_NV, logits_NV, targets_N, spread)[:, 0]]
    return np.concatenate(short)


def _long_range(short_N: np.ndarray, found_T4: np.ndarray) -> tuple[int, float, float, float] | None:
    """The long-range tokens in a window, as `long_range_row` takes them; None if they are few."""
    judged_N4 = found_T4[len(found_T4) - len(short_N) :]
    gain_N = short_N - judged_N4[:, 0]
    long_range_N = is_long_range(gain_N)
    before, after = judged_N4[long_range_N, :2].sum(0)
    return (
        None
        if long_range_N.sum() < FEWEST
        else (int(long_range_N.sum()), float(before), float(after), float(gain_N[long_range_N].sum()))
    )


def _logits(decoder: Any, ids_BT: np.ndarray) -> np.ndarray:
    """Logits [B, T - 1, V] of the next token at each position."""
    decoder.begin(len(ids_BT))
    logits_BTV: np.ndarray = decoder.step(ids_BT)[:, :-1]
    if logits_BTV.shape[1] != ids_BT.shape[1] - 1:
        raise NblError(
            "this graph gives logits of the last position only, and the perplexity increase needs the logits of all "
            "positions: keep all_logits.onnx beside the graph, or export with the key logits = 'all'"
        )
    return logits_BTV


def _behind_prompt(decoder: Any, ids_BT: np.ndarray, prompt: int, most: int) -> np.ndarray:
    """Logits of the next token from the last one of a prompt on, in steps of at most so many tokens."""
    decoder.begin(len(ids_BT))
    starts = range(prompt, ids_BT.shape[1] - 1, most)
    steps = (ids_BT[:, start : min(start + most, ids_BT.shape[1] - 1)] for start in starts)
    return np.concatenate([decoder.step(ids_BT[:, :prompt])[:, -1:], *map(decoder.step, steps)], 1)


def _compare(base_TV: np.ndarray, ours_TV: np.ndarray, target_T: np.ndarray, spread: Spread) -> np.ndarray:
    """Of each position of a window: loss of both graphs, KL, and whether both have the same best token; [T, 4]."""
    parts = [slice(start, start + _PART_ROWS) for start in range(0, len(target_T), _PART_ROWS)]
    found = spread(_apart, *zip(*((base_TV[part], ours_TV[part], target_T[part]) for part in parts), strict=True))
    return np.concatenate(list(found))


def _apart(base_TV: np.ndarray, ours_TV: np.ndarray, target_T: np.ndarray) -> np.ndarray:
    found = np.zeros((len(target_T), 4))
    rows = max(1, _ROW_BYTES // (4 * base_TV.shape[1]))
    for start in range(0, len(target_T), rows):
        here = slice(start, start + rows)
        target = target_T[here]
        place = np.arange(len(target))
        (base_NV, base_best, base_norm, exp_NV), (ours_NV, ours_best, ours_norm, _) = (
            _normalised(v[here]) for v in (base_TV, ours_TV)
        )
        # sum p (log p - log q), log p = base - norm, with p = exp(base) / exp(norm)
        apart_N = np.einsum("nv,nv->n", exp_NV, base_NV - ours_NV) / np.exp(base_norm) + ours_norm - base_norm
        found[here, 0] = base_norm - base_NV[place, target]
        found[here, 1] = ours_norm - ours_NV[place, target]
        found[here, 2] = apart_N
        found[here, 3] = base_best == ours_best
    return found


def _normalised(logits_NV: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logits minus the row's largest, its index, log of the sum of exponentials, and the exponentials."""
    best_N = logits_NV.argmax(1)
    shifted_NV = logits_NV - logits_NV[np.arange(len(best_N)), best_N, None]
    exp_NV = np.exp(shifted_NV)
    return shifted_NV, best_N, np.log(exp_NV.sum(1)), exp_NV


def _row(name: str, tokens: int, found: Sequence[np.ndarray], looks: tuple[int, ...]) -> dict[str, Any]:
    before, after, kl, agree = np.array(found).T
    increase = increase_interval(before, after, looks)
    apart = mean_interval(kl, (0.0, math.inf), looks)
    same = mean_interval(agree, (0.0, 1.0), looks)
    return {
        "text": name,
        "tokens": tokens,
        "windows": len(found),
        "looks": list(looks),
        "perplexity_original": perplexity(before),
        "perplexity_nbl": perplexity(after),
        "increase": increase.value,
        "increase_interval": increase.ends,
        "kl_mean": apart.value,
        "kl_interval": apart.ends,
        "top1_agreement": same.value,
        "top1_interval": same.ends,
        "per_window": {
            "loss_original": before.tolist(),
            "loss_nbl": after.tolist(),
            "kl": kl.tolist(),
            "top1_agreement": agree.tolist(),
        },
    }
