"""The ladder from file to text: does the exported graph compute what the torch model computes?

    a  the file (`verify_file`): valid, contract and cache bytes as predicted, maps as fitted, the rest untouched;
       codes as the checkpoint's matrices, kernels as the codes (`verify_codes`)
    b  original graph against the original torch model
    c  NBL graph against the NBL torch model: prefill and cached steps, a batch of two different lengths, one long row
    d  greedy text, through the runtime that ships, against torch
    e  the price (`price`): NBL against original on held-back text; reported, not gated
    f  the graph that ships, where it gives the logits of the last token alone (`verify_last`), against the one with all
    g  a quantised graph against its float32 twin's truth: what is left is the rounding of activations

A graph with int4 or int8 matrices climbs b and c as its float32 twin, with torch holding those very matrices: wiring is
proven to float32 accuracy at every precision. Rungs b, c, e and g need the logits of all positions; d and f run what
ships.

One table of tolerances by precision; nothing else decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nbl_export.records import Plan, RungResult

__all__ = [
    "DECODE_STEPS",
    "LONG_CHUNK",
    "TOLERANCES",
    "Probe",
    "Tolerance",
    "check_greedy",
    "check_logits",
    "check_long",
    "greedy",
    "run_rows",
    "shown_positions",
]

DECODE_STEPS = 16
LONG_CHUNK = 512  # tokens of a long row that are appended at once
_SHOWN_EVERY, _SHOWN_LAST = 8, 64  # positions of a long row that are compared: some of all, and all of the last
# Two float32 engines round at hundreds of places, the noise probe at one: measured ratios are 1 to 13.
NOISE_FACTOR = 16.0


@dataclass(frozen=True)
class Tolerance:
    """What a precision is held to.

    metric: "max_abs" (largest logit difference) or "relative_rms" (rms of the difference over rms of the logits).
    limit: for rungs b, c and g. ratio: rung c may be at most this many times rung b's figure (None: no such rule);
    greedy_margin: a greedy choice may differ where torch's two best logits are closer than this.
    greedy_equal: the least share of greedy tokens that are the same, up to the first difference of each text.
    """

    metric: str
    limit: float
    ratio: float | None
    greedy_margin: float
    greedy_equal: float = 0.0


# fp32: agreement of two float32 implementations of the same graph, which the twins of quantised graphs are held to as
# well. fp16: the yardstick is the original graph's own error (rung b). int8 and int4: rung g, where both sides have the
# same matrices and kernels round activations to 8 bits. Measured: bench/results/twins.json, precision-smollm2.json.
TOLERANCES = {
    "fp32": Tolerance("max_abs", 1e-3, None, 1e-2, 0.5),
    "fp16": Tolerance("relative_rms", 0.02, 2.0, 0.5),
    "int8": Tolerance("relative_rms", 0.1, None, 1.0),
    "int4": Tolerance("relative_rms", 0.1, None, 1.0),
}
# A graph in codes that no twin can be made of is held to torch as it is, which finds little: the codes' own noise.
WITHOUT_TWIN = {
    "int8": Tolerance("relative_rms", 0.1, 1.5, 1.0),
    "int4": Tolerance("relative_rms", 0.75, 1.5, 4.0),
}


@dataclass(frozen=True)
class Probe:
    """Held-back token ids to compare on: two rows of different length, each followed by forced decode steps.

    prompts, new_tokens: of greedy text. long: one row that is prefilled in chunks, decode steps behind it.
    """

    rows: tuple[tuple[int, ...], ...]
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    long: tuple[int, ...] = ()


def shown_positions(length: int) -> np.ndarray:
    """Positions of a long row whose logits are compared, ascending; its decode steps are the last of them."""
    prefill = length - DECODE_STEPS
    every, last = range(0, prefill, _SHOWN_EVERY), range(max(0, prefill - _SHOWN_LAST), length)
    return np.array(sorted({*every, *last}), np.int64)


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


def run_long(decoder: Any, row: Sequence[int]) -> np.ndarray:
    """Logits [positions, V] of a row at `shown_positions`: prefill in chunks, then cached steps."""
    shown, prefill = set(shown_positions(len(row)).tolist()), len(row) - DECODE_STEPS
    starts = [*range(0, prefill, LONG_CHUNK), *range(prefill, len(row))]
    decoder.begin(1)
    found = []
    for start in starts:
        end = min(start + LONG_CHUNK, prefill) if start < prefill else start + 1
        logits = decoder.step(np.asarray([row[start:end]], np.int64))[0]
        found.append(logits[[k - start for k in range(start, end) if k in shown]])
    return np.concatenate(found)


def check_logits(
    rung: str,
    subject: str,
    decoder: Any,
    rows: Sequence[Sequence[int]],
    expected: Sequence[np.ndarray],
    noise: Sequence[np.ndarray],
    tolerance: Tolerance,
    yardstick: float | None = None,
) -> list[RungResult]:
    """Logits of prefill and of cached steps against torch, each row by itself and as a batch.

    Args:
        noise: what a few float32 roundings are worth at each position of each row (`reference.Reference`). With
            the max_abs metric a position may differ by the limit, or by NOISE_FACTOR times that, if it is more.
        yardstick: rung b's largest figure, where the precision's rule compares with it.
    """
    results: list[RungResult] = []
    for name, got in (
        ("one sequence", [run_rows(decoder, [row])[0] for row in rows]),
        ("batch of 2, different lengths", run_rows(decoder, rows)),
    ):
        results += _judge(rung, subject, name, got, expected, noise, tolerance, yardstick)
    return results


def check_long(
    rung: str,
    subject: str,
    decoder: Any,
    row: Sequence[int],
    expected: np.ndarray,
    noise: np.ndarray,
    tolerance: Tolerance,
    yardstick: float | None = None,
) -> list[RungResult]:
    """The same of one long row in chunks, at `shown_positions`: what no short row has, far rope and whole windows."""
    name = f"one sequence of {len(row)} tokens in chunks of {LONG_CHUNK}"
    return _judge(rung, subject, name, [run_long(decoder, row)], [expected], [noise], tolerance, yardstick)


def _judge(
    rung: str, subject: str, name: str, got: Sequence[np.ndarray], expected: Sequence[np.ndarray],
    noise: Sequence[np.ndarray], tolerance: Tolerance, yardstick: float | None,
) -> list[RungResult]:  # fmt: skip
    """A result for prefill and one for decode: the worst of the rows."""
    limit = tolerance.limit
    if yardstick is not None and tolerance.ratio is not None:
        limit = min(limit, max(yardstick * tolerance.ratio, 1e-4))
    distance = _max_abs if tolerance.metric == "max_abs" else _relative_rms
    results = []
    for part, cut in (("prefill", slice(None, -DECODE_STEPS)), ("decode", slice(-DECODE_STEPS, None))):
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


def greedy(decoder: Any, prompt: Sequence[int], new_tokens: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Continuation of a decoder with logits, and the gap between the two best of them at each of its tokens."""
    ids: list[int] = []
    gaps: list[float] = []
    decoder.begin(1)
    logits = decoder.step(np.asarray([prompt]))[0, -1]
    for _ in range(new_tokens):
        second, best = np.argsort(logits)[-2:]
        ids.append(int(best))
        gaps.append(float(logits[best] - logits[second]))
        logits = decoder.step(np.asarray([[best]]))[0, -1]
    return tuple(ids), tuple(gaps)


def check_greedy(
    subject: str,
    said: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    margins: Sequence[Sequence[float]],
    tolerance: Tolerance,
    what: str = "",
) -> RungResult:
    """Rung d: greedy tokens agree with torch's, or first differ where torch itself was undecided.

    Args:
        what: said the tokens; "" is what ships.
    """
    limit = tolerance.greedy_margin
    worst, same, total = 0.0, 0, 0
    for ours, theirs, gaps in zip(said, expected, margins, strict=True):
        total += len(theirs)
        split = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        same += len(theirs) if split is None else split
        if split is not None:
            worst = max(worst, gaps[split])
    enough = same >= tolerance.greedy_equal * total
    least = f", {tolerance.greedy_equal:.0%} at least" if tolerance.greedy_equal else ""
    detail = f"{same} of {total} tokens the same up to the first difference{least}"
    metric = "torch's margin where greedy text first differs"
    return RungResult(
        "d", subject, metric, worst, limit, worst <= limit and enough, f"{what}; {detail}" if what else detail
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
