"""Check last_token: the graph with the logits of the last token against the graph with all logits, on the same caches.

    prefill of one sequence                 batch of lengths 1, 5 and 12, padded on the right, then two decode steps
    chunk of 7 after a cache of 13          single decode steps after it
    all but the last again, W longer        if a prompt stops at an exit layer, and prefills of W + 1 and of W + 2
    tokens

Both graphs run the same chunks, one graph after the other. The figure of a step is that of the worst row. The shipped
logits [B, 1, V] are compared with the other graph's logits of the row's last valid token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nbl_export.records.results import YES_NO, CheckResult
from nbl_export.targets.checks import apart

__all__ = ["BATCH_LENGTHS", "check_last", "expected_last"]

BATCH_LENGTHS = (1, 5, 12)
_CACHED = 13
_CHUNK = 7
_STEPS = 3

Chunk = tuple[np.ndarray, np.ndarray]  # token ids [B, T], and 1 at each valid token [B, T]
Expected = list[list[list[tuple[np.ndarray, float]]]]  # logits [V] and their limit, of each row of each step of a case


def expected_last(every: Any, row: Sequence[int], limit: float, continuing: int | None = None) -> Expected:
    """What the logits of last tokens have to be, from the graph with all logits (a `GraphDecoder`).

    Half the distance to the nearest other position of the chunk is a second limit. It proves that the logits are those
    of the right token.

    Args:
        row: at least 32 token ids of real text, and `continuing` more.
        limit: of the rms of the logit difference over the rms of the logits.
        continuing: W, if longer steps stop at an exit layer.
    """
    found: Expected = []
    for _, chunks in _cases(row, continuing):
        every.begin(len(chunks[0][0]))
        steps = ((every.step(ids_BT, valid_BT), valid_BT) for ids_BT, valid_BT in chunks)
        found.append(
            [
                [_expected(all_TV[: valid_T.sum()], limit) for all_TV, valid_T in zip(*step, strict=True)]
                for step in steps
            ]
        )
    return found


def _expected(all_TV: np.ndarray, limit: float) -> tuple[np.ndarray, float]:
    right_V = all_TV[-1].copy()
    others_TV = all_TV[:-1]
    computed_TV = others_TV[~np.isnan(others_TV).any(1)]
    return right_V, min([limit, *(apart(right_V, other_V) / 2 for other_V in computed_TV)])


def check_last(
    subject: str, expected: Expected, last: Any, row: Sequence[int], continuing: int | None = None
) -> list[CheckResult]:
    """Compare the graph with the logits of the last token (a `GraphDecoder`) with what `expected_last` found.

    Args:
        row, continuing: as in `expected_last`.
    """
    cases = zip(_cases(row, continuing), expected, strict=True)
    return [_judge(subject, name, last, chunks, steps) for (name, chunks), steps in cases]


def _cases(row: Sequence[int], continuing: int | None) -> Iterator[tuple[str, list[Chunk]]]:
    yield "prefill", [_chunk(row)]
    yield _behind_cache(row, _CHUNK)
    yield _batch(row, BATCH_LENGTHS)
    if continuing is not None:
        yield from _exit_cases(row, continuing)


def _exit_cases(row: Sequence[int], continuing: int) -> Iterator[tuple[str, list[Chunk]]]:
    for length in (continuing + 1, continuing + 2):
        yield f"prefill of {length} tokens", [_chunk(row[:length])]
    yield _behind_cache(row, continuing + _CHUNK)
    yield _batch(row, tuple(continuing + length for length in BATCH_LENGTHS[1:]))
    yield _batch(row, (continuing + 1, continuing + BATCH_LENGTHS[2]))


def _chunk(ids: Sequence[int]) -> Chunk:
    found = np.asarray(ids, np.int64)[None]
    return found, np.ones_like(found)


def _behind_cache(row: Sequence[int], length: int) -> tuple[str, list[Chunk]]:
    ends = (_CACHED, _CACHED + length, *(_CACHED + length + 1 + k for k in range(_STEPS)))
    chunks = [_chunk(row[start:end]) for start, end in itertools.pairwise((0, *ends))]
    return f"chunk of {length} after a cache of {_CACHED}, then decode", chunks


def _batch(row: Sequence[int], given: tuple[int, ...]) -> tuple[str, list[Chunk]]:
    ids = np.asarray(row, np.int64)
    lengths = np.array(given)
    places = np.arange(lengths.max())
    starts = np.arange(len(lengths))[:, None]  # rows of a batch begin at different tokens
    valid = (places < lengths[:, None]).astype(np.int64)
    batch = ids[starts + places] * valid
    single = np.ones((len(lengths), 1), np.int64)
    steps = [(ids[starts + lengths[:, None] + k], single) for k in range(2)]
    named = f"{', '.join(map(str, given[:-1]))} and {given[-1]}"
    return f"batch of lengths {named}, then decode", [(batch, valid), *steps]


def _judge(
    subject: str, name: str, last: Any, chunks: list[Chunk], steps: list[list[tuple[np.ndarray, float]]]
) -> CheckResult:
    figures = []
    last.begin(len(chunks[0][0]))
    for (ids_BT, valid_BT), expected in zip(chunks, steps, strict=True):
        try:
            last_BTV = last.step(ids_BT, valid_BT)
        except Exception as error:  # ONNX Runtime has its own exceptions; a graph with mixed lengths does not run
            return _broken(subject, f"{name}: {' '.join(str(error).split())[:200]}")
        if last_BTV.shape[1] != 1:
            return _broken(subject, f"{name}: gives logits {list(last_BTV.shape)}")
        figures += [
            (apart(right_V, found_V), limit) for (right_V, limit), found_V in zip(expected, last_BTV[:, 0], strict=True)
        ]
    value, limit = max(figures, key=lambda f: f[0] / f[1] if np.isfinite(f[0]) else np.inf)
    metric = "relative rms logit difference, last token"
    return CheckResult("last_token", subject, metric, value, limit, bool(np.isfinite(value) and value <= limit), name)


def _broken(subject: str, detail: str) -> CheckResult:
    return CheckResult("last_token", subject, "logits of the last token alone", 1.0, YES_NO, False, detail)
