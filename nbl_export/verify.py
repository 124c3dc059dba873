"""The ladder from file to text: does the exported graph compute what the torch model computes?

    a  the file (`verify_file`): valid, contract and cache bytes as predicted, maps as fitted, the rest untouched
    b  original graph against the original torch model: the yardstick
    c  NBL graph against the NBL torch model: prefill and cached steps, a batch of two different lengths
    d  greedy text through the runtime that ships, against torch
    e  the price (`price`): NBL against original on held-back text; reported, not gated
    f  the graph that ships, where it gives the logits of the last token alone (`verify_last`), against the one with all

Rungs b, c and e need the logits of all positions; d and f run what ships.

One table of tolerances by precision; nothing else decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nbl_export.records import Plan, RungResult

__all__ = ["DECODE_STEPS", "TOLERANCES", "Probe", "Tolerance", "check_greedy", "check_logits"]

DECODE_STEPS = 16
# Two float32 engines round at hundreds of places, the noise probe at one: measured ratios are 1 to 13.
NOISE_FACTOR = 16.0


@dataclass(frozen=True)
class Tolerance:
    """What a precision is held to.

    metric: "max_abs" (largest logit difference) or "relative_rms" (rms of the difference over rms of the logits).
    limit: for rungs b and c. ratio: rung c may be at most this many times rung b's figure (None: no such rule);
    greedy_margin: a greedy choice may differ where torch's two best logits are closer than this.
    """

    metric: str
    limit: float
    ratio: float | None
    greedy_margin: float


# fp32: agreement of two float32 implementations of the same graph. The other rows judge the graph, not its
# quality: the yardstick is the original graph's own error at that precision (rung b), and the limit catches a
# graph that is wrong altogether (one transposed map: 0.4 to 1.4). What drowns in quantisation noise (a lost bias,
# two maps exchanged) is rung a's to find. Measured figures behind each row: bench/README.md.
TOLERANCES = {
    "fp32": Tolerance("max_abs", 1e-3, None, 1e-2),
    "fp16": Tolerance("relative_rms", 0.02, 2.0, 0.5),
    "int8": Tolerance("relative_rms", 0.1, 1.5, 1.0),
    "int4": Tolerance("relative_rms", 0.75, 1.5, 4.0),
}


@dataclass(frozen=True)
class Probe:
    """Held-back token ids to compare on: two rows of different length, each followed by forced decode steps."""

    rows: tuple[tuple[int, ...], ...]
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int


def run_rows(decoder: Any, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Logits [length, V] of each row from one right-padded batch: prefill, then cached steps one token at a time."""
    lengths = [len(row) - DECODE_STEPS for row in rows]
    ids = np.zeros((len(rows), max(lengths)), np.int64)
    valid = np.zeros_like(ids)
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[b, :length], valid[b, :length] = row[:length], 1
    decoder.begin(len(rows))
    prefill = decoder.step(ids, valid)
    steps = [
        decoder.step(np.array([[row[length + k]] for row, length in zip(rows, lengths, strict=True)]))
        for k in range(DECODE_STEPS)
    ]
    return [np.concatenate([prefill[b, :length], *(step[b] for step in steps)]) for b, length in enumerate(lengths)]


def check_logits(
    rung: str,
    subject: str,
    decoder: Any,
    rows: Sequence[Sequence[int]],
    expected: Sequence[np.ndarray],
    noise: Sequence[np.ndarray],
    precision: str,
    yardstick: float | None = None,
) -> list[RungResult]:
    """Rungs b and c: logits of prefill and of cached steps against torch, each row by itself and as a batch.

    Args:
        noise: what a few float32 roundings are worth at each position of each row (`reference.Reference`). With
            the max_abs metric a position may differ by the limit, or by NOISE_FACTOR times that, if it is more.
        yardstick: rung b's largest figure, where the precision's rule compares with it.
    """
    tolerance = TOLERANCES[precision]
    limit = tolerance.limit
    if yardstick is not None and tolerance.ratio is not None:
        limit = min(limit, max(yardstick * tolerance.ratio, 1e-4))
    results: list[RungResult] = []
    for name, got in (
        ("one sequence", [run_rows(decoder, [row])[0] for row in rows]),
        ("batch of 2, different lengths", run_rows(decoder, rows)),
    ):
        for part, cut in (("prefill", slice(None, -DECODE_STEPS)), ("decode", slice(-DECODE_STEPS, None))):
            distance = _max_abs if tolerance.metric == "max_abs" else _relative_rms
            judged = [distance(g[cut], e[cut], n[cut], limit) for g, e, n in zip(got, expected, noise, strict=True)]
            value, allowed, loose = max(judged, key=lambda j: j[0] / j[1] if np.isfinite(j[0]) else np.inf)
            passed = bool(np.isfinite(value) and value <= allowed)
            metric = f"{tolerance.metric.replace('_', ' ')} logit difference, {part}"
            detail = f"{name}; {loose} positions where float32 is worth more than {limit:g}" if loose else name
            results.append(RungResult(rung, subject, metric, value, allowed, passed, detail))
    return results


def _max_abs(got: np.ndarray, expected: np.ndarray, noise: np.ndarray, limit: float) -> tuple[float, float, int]:
    """The worst position's difference and what it is allowed, and how many positions are allowed more than limit."""
    seen = np.abs(got.astype(np.float64) - expected).max(1)
    allowed = np.maximum(limit, NOISE_FACTOR * noise.astype(np.float64))
    worst = int(np.argmax(np.where(np.isfinite(seen), seen, np.inf) / allowed))
    return float(seen[worst]), float(allowed[worst]), int((allowed > limit).sum())


def _relative_rms(got: np.ndarray, expected: np.ndarray, _noise: np.ndarray, limit: float) -> tuple[float, float, int]:
    wide = expected.astype(np.float64)
    return float(np.sqrt(np.square(got - wide).mean() / np.square(wide).mean())), limit, 0


def check_greedy(
    subject: str,
    said: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    margins: Sequence[Sequence[float]],
    precision: str,
) -> RungResult:
    """Rung d: greedy tokens agree with torch's, or first differ where torch itself was undecided."""
    limit = TOLERANCES[precision].greedy_margin
    worst, same, total = 0.0, 0, 0
    for ours, theirs, gaps in zip(said, expected, margins, strict=True):
        total += len(theirs)
        split = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        same += len(theirs) if split is None else split
        if split is not None:
            worst = max(worst, gaps[split])
    detail = f"{same} of {total} tokens the same up to the first difference"
    return RungResult(
        "d", subject, "torch's margin where greedy text first differs", worst, limit, worst <= limit, detail
    )


def summary(results: Sequence[RungResult], precision: str, prices: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The value of verify.json, without the cache figures."""
    return {
        "passed": all(r.passed for r in results),
        "precision": precision,
        "replaced_layers": list(plan.replaced),
        "rungs": [asdict(r) for r in results],
        "price": prices,
    }
