"""Check quality, the quality loss of the replacement: perplexity increase, KL and top-1 agreement, window by window.

    windows ─► logits of both graphs ─► loss, KL and agreement of each window ─► figure and 95% interval

If a prompt stops at a cut, the first half of a window is the prompt, which stops as it does in use. The second half is
scored. It is appended in steps that climb as a whole, so each of its positions has logits. The original is scored on
the same positions.

Reported, not gated. A pass over the vocabulary computes in float32, a few rows at a time; sums are float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from nbl_export.errors import NblError
from nbl_export.records.quality import increase_interval, mean_interval, perplexity

__all__ = ["quality_loss"]

# Of a batch of windows. Two windows at once take about a tenth less time than one by one (SmolLM2, float32). The
# logits of 512 tokens with a vocabulary of 49,152 are 100 MB, and both graphs have some at a time.
_STEP_TOKENS, _STEP_BYTES = 1024, 1 << 28
_ROW_BYTES = 1 << 19  # of logits processed at once, so that they fit in a processor cache
_PART_ROWS = 64  # that a thread compares; numpy computes without the interpreter's lock

Spread = Callable[..., Iterable[np.ndarray]]  # `map`, or a pool's


def quality_loss(
    original: Any,
    nbl: Any,
    texts: Sequence[tuple[str, np.ndarray]],
    progress: Callable[[int, int], None],
    near: int | None = None,
) -> list[dict[str, Any]]:
    """Perplexity of both graphs, its increase, KL(original || NBL) in nats and top-1 agreement on each text.

    Args:
        texts: name and token ids [windows, context].
        near: W, if the prompts of `nbl` stop at a cut.

    Returns:
        one row a text; intervals are [low, high], computed from "per_window", and None for a single window. With `near`
        also "prompt", the tokens of a window that are not scored.
    """
    total, done = sum(len(windows) for _, windows in texts), 0
    rows = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, windows in texts:
            found: list[np.ndarray] = []
            batch, prompt = 1, 0 if near is None else windows.shape[1] // 2
            while len(found) < len(windows):
                ids_BT = windows[len(found) : len(found) + batch]
                base_BTV = _logits(original, ids_BT)
                ours_BTV = _logits(nbl, ids_BT) if near is None else _behind_prompt(nbl, ids_BT, prompt, near + 1)
                both = zip(base_BTV[:, -ours_BTV.shape[1] :], ours_BTV, ids_BT[:, max(1, prompt) :], strict=True)
                found += [_compare(base_TV, ours_TV, target_T, pool.map) for base_TV, ours_TV, target_T in both]
                progress(done + len(found), total)
                if near is None:  # else one: ONNX Runtime takes a chunk behind a cache for a single sequence
                    batch = max(1, min(_STEP_TOKENS // windows.shape[1], _STEP_BYTES // base_BTV[0].nbytes))
            done += len(windows)
            rows.append(_row(name, windows, np.array(found)) | ({} if near is None else {"prompt": prompt}))
    return rows


def _logits(decoder: Any, ids_BT: np.ndarray) -> np.ndarray:
    """Logits [B, T - 1, V] of the next token at each position."""
    decoder.begin(len(ids_BT))
    logits_BTV: np.ndarray = decoder.step(ids_BT)[:, :-1]
    if logits_BTV.shape[1] != ids_BT.shape[1] - 1:
        raise NblError(
            "this graph gives logits of the last position only, and the perplexity increase needs the logits of all "
            "positions: keep all_logits.onnx beside the graph, or export with --logits all"
        )
    return logits_BTV


def _behind_prompt(decoder: Any, ids_BT: np.ndarray, prompt: int, most: int) -> np.ndarray:
    """Logits of the next token from the last one of a prompt on, in steps of at most so many tokens."""
    decoder.begin(len(ids_BT))
    starts = range(prompt, ids_BT.shape[1] - 1, most)
    steps = (ids_BT[:, start : min(start + most, ids_BT.shape[1] - 1)] for start in starts)
    return np.concatenate([decoder.step(ids_BT[:, :prompt])[:, -1:], *map(decoder.step, steps)], 1)


def _compare(base_TV: np.ndarray, ours_TV: np.ndarray, target_T: np.ndarray, spread: Spread) -> np.ndarray:
    """One window: loss of both graphs, KL, and share of positions with the same best token."""
    parts = [slice(start, start + _PART_ROWS) for start in range(0, len(target_T), _PART_ROWS)]
    sums = spread(_sums, *zip(*((base_TV[part], ours_TV[part], target_T[part]) for part in parts), strict=True))
    return np.asarray(sum(sums) / len(target_T))


def _sums(base_TV: np.ndarray, ours_TV: np.ndarray, target_T: np.ndarray) -> np.ndarray:
    sums = np.zeros(4)
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
        sums += [
            (base_norm - base_NV[place, target]).sum(dtype=np.float64),
            (ours_norm - ours_NV[place, target]).sum(dtype=np.float64),
            apart_N.sum(dtype=np.float64),
            (base_best == ours_best).sum(),
        ]
    return sums


def _normalised(logits_NV: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logits minus the row's largest, its index, log of the sum of exponentials, and the exponentials."""
    best_N = logits_NV.argmax(1)
    shifted_NV = logits_NV - logits_NV[np.arange(len(best_N)), best_N, None]
    exp_NV = np.exp(shifted_NV)
    return shifted_NV, best_N, np.log(exp_NV.sum(1)), exp_NV


def _row(name: str, windows: np.ndarray, found_W4: np.ndarray) -> dict[str, Any]:
    before, after, kl, agree = found_W4.T
    increase, apart, same = increase_interval(before, after), mean_interval(kl), mean_interval(agree, (0.0, 1.0))
    return {
        "text": name,
        "tokens": int(windows.size),
        "windows": len(windows),
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
