"""The verification ladder: does the rewritten graph compute the exporter's graph with the mixers put in?

    structure    the file (`structure`): valid, contract and cache bytes as predicted, maps as fitted, other weights
                 unchanged
    exporter     original graph against the torch model (`exporter`); int8 and int4 by perplexity
    original     original graph: cached steps, batches and chunks against one pass
    nbl          NBL graph against the reference: prefill and cached steps, a batch of two lengths, one long row
    shipped      the same in the arithmetic that ships, if that rounds activations
    text         greedy text of the shipped runtime against the reference in the same arithmetic
    quality      quality loss (`perplexity`): NBL against original on held-back text; reported, not gated
    last_token   a shipped graph with the logits of the last token alone against the graph with all logits

The reference is the original graph in which the mixers that the NBL graph stores take the place of attention. Both have
the same matrices, so checks original, nbl and last_token compare them in arithmetic that does not round activations.
They and quality need the logits of all positions; text and last_token run what ships.

If a prompt stops at an exit layer (`methods.predicted_kv.maps`), logits of tokens that do not continue are NaN. Both
sides must have NaN at the same positions, and the others are compared. What continues depends on the borders of
steps, so both have the same.

One table of tolerances decides every check, by the arithmetic of what is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nbl_export.records.plan import Plan
from nbl_export.records.results import FAILED, CheckResult, status_of
from nbl_export.targets.checks import apart

__all__ = [
    "DECODE_STEPS",
    "LONG_CHUNK",
    "ON_GPU",
    "PERPLEXITY",
    "TOLERANCES",
    "Probe",
    "Reference",
    "Tolerance",
    "check_greedy",
    "check_logits",
    "check_long",
    "greedy",
    "judge",
    "largest_margin",
    "proof",
    "run_chunks",
    "run_long",
    "run_rows",
    "shown_positions",
]


DECODE_STEPS = 16
LONG_CHUNK = 512  # tokens of a long row that are appended at once
PERPLEXITY = "perplexity increase over the torch model"  # metric of check exporter for int8 and int4
_SHOWN_EVERY = 8  # compared positions of a long row's prefill: every 8th, and the last 64
_SHOWN_LAST = 64


@dataclass(frozen=True)
class Tolerance:
    """The limits of an arithmetic.

    Attributes:
        limit: largest rms of the logit difference over the rms of the logits.
        greedy_margin: a greedy token may differ if the reference's two best logits are closer than this.
        greedy_equal: smallest share of equal greedy tokens, counted up to the first difference of each text.
    """

    limit: float
    greedy_margin: float
    greedy_equal: float = 0.0


# By arithmetic: float types of a graph; int8 and int4: kernels that round activations to 8 bits; narrow: an engine that
# computes in bfloat16 with keys and values in 8 bits.
TOLERANCES = {
    "fp32": Tolerance(1e-4, 1e-2, 0.5),
    "fp16": Tolerance(0.01, 0.5),
    "bf16": Tolerance(0.06, 0.5),
    "int8": Tolerance(0.1, 1.0),
    "int4": Tolerance(0.1, 1.0),
    "narrow": Tolerance(0.1, 1.0),
}
# `accept`: an engine on its GPU against the reference of the ladder. No GPU has been measured. fp16: as fp32, but the
# engine also sums in fp16. On ONNX Runtime's CPU provider the tiny Mistral of the tests is at 0.001 with fp16 and at
# 0.033 with int4.
ON_GPU = TOLERANCES | {"fp32": Tolerance(1e-3, 0.5), "fp16": Tolerance(0.02, 0.5)}


@dataclass(frozen=True)
class Probe:
    """Held-back token ids for the comparison: two rows of different length, each followed by forced decode steps.

    prompts, new_tokens: of greedy text. long: one row, prefilled in chunks and followed by decode steps.
    continuing: a batch of two rows for a model with an exit layer, of which one is so short that all tokens continue.
    """

    rows: tuple[tuple[int, ...], ...]
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    long: tuple[int, ...] = ()
    continuing: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Reference:
    """What a graph is compared with.

    Attributes:
        logits: of each row, [length, V] float32. continuing: of the rows of this batch; empty without an exit layer.
        long: of the long row at `shown_positions`, [positions, V]; None without one.
        greedy: greedy continuations of the prompts.
        margins: gaps between the best and the second-best logit at each greedy step. If a gap is below the noise of the
            arithmetic, another engine may choose the other token.
    """

    logits: tuple[np.ndarray, ...]
    long: np.ndarray | None
    greedy: tuple[tuple[int, ...], ...] = ()
    margins: tuple[tuple[float, ...], ...] = ()
    continuing: tuple[np.ndarray, ...] = ()


def shown_positions(length: int) -> np.ndarray:
    """Ascending positions of a long row whose logits are compared; the decode steps come last."""
    prefill = length - DECODE_STEPS
    every = range(0, prefill, _SHOWN_EVERY)
    last = range(max(0, prefill - _SHOWN_LAST), length)
    return np.array(sorted({*every, *last}), np.int64)


def run_rows(decoder: Any, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Logits [length, V] of each row from one right-padded batch: prefill, then cached steps one token at a time."""
    lengths = [len(row) - DECODE_STEPS for row in rows]
    ids = np.zeros((len(rows), max(lengths)), np.int64)
    valid = np.zeros_like(ids)
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[b, :length] = row[:length]
        valid[b, :length] = 1
    decoder.begin(len(rows))
    prefill = decoder.step(ids, valid)
    steps = [
        decoder.step(np.array([[row[length + k]] for row, length in zip(rows, lengths, strict=True)]))
        for k in range(DECODE_STEPS)
    ]
    return [np.concatenate([prefill[b, :length], *(step[b] for step in steps)]) for b, length in enumerate(lengths)]


def run_long(decoder: Any, row: Sequence[int]) -> np.ndarray:
    """Logits [positions, V] of a row at `shown_positions`: prefill in chunks, then cached steps."""
    prefill = len(row) - DECODE_STEPS
    return run_chunks(decoder, row, [*range(0, prefill, LONG_CHUNK), *range(prefill, len(row))])


def run_chunks(decoder: Any, row: Sequence[int], starts: Sequence[int], shown: np.ndarray | None = None) -> np.ndarray:
    """Logits [positions, V] of a row, appended in chunks that begin at `starts`.

    Args:
        shown: ascending positions; None for `shown_positions`. Of a decoder with the logits of the last token alone,
            these are the ends of chunks.
    """
    shown = shown_positions(len(row)) if shown is None else shown
    decoder.begin(1)
    found = []
    for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
        logits = decoder.step(np.asarray([row[start:end]], np.int64))[0]
        found.append(logits[shown[(start <= shown) & (shown < end)] - end])
    return np.concatenate(found)


def check_logits(
    check: str, subject: str, decoder: Any, probe: Probe, truth: Reference, limit: float
) -> list[CheckResult]:
    """Compare logits of prefill and of cached steps with a reference, each row alone and as a batch."""
    alone = [run_rows(decoder, [row])[0] for row in probe.rows]
    cases = [
        ("one sequence", alone, truth.logits),
        ("batch of 2, different lengths", run_rows(decoder, probe.rows), truth.logits),
    ]
    if truth.continuing:
        cases.append(("batch of 2, all tokens continue", run_rows(decoder, probe.continuing), truth.continuing))
    return [
        result
        for name, got, right in cases
        for result in judge(check, subject, name, list(zip(got, right, strict=True)), limit)
    ]


def check_long(
    check: str, subject: str, decoder: Any, row: Sequence[int], truth: Reference, limit: float
) -> list[CheckResult]:
    """Like `check_logits` for one long row in chunks, at `shown_positions`.

    Only a long row has large rotary angles and full attention windows.
    """
    name = f"one sequence of {len(row)} tokens in chunks of {LONG_CHUNK}"
    assert truth.long is not None
    return judge(check, subject, name, [(run_long(decoder, row), truth.long)], limit)


def judge(
    check: str, subject: str, name: str, rows: Sequence[tuple[np.ndarray, np.ndarray]], limit: float
) -> list[CheckResult]:
    """One result for prefill and one for decode, of the worst row.

    Args:
        rows: what was got, and what is expected; the last `DECODE_STEPS` positions are decode.
    """
    results = []
    for part, positions in (("prefill", slice(None, -DECODE_STEPS)), ("decode", slice(-DECODE_STEPS, None))):
        figures = [apart(expected[positions], got[positions]) for got, expected in rows]
        value = float(np.max(figures))  # NaN if one is
        passed = bool(np.isfinite(value) and value <= limit)
        results.append(
            CheckResult(check, subject, f"relative rms logit difference, {part}", value, limit, passed, name)
        )
    return results


def greedy(decoder: Any, prompt: Sequence[int], new_tokens: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Greedy continuation of a decoder, and the gap between the two best logits at each token."""
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


def largest_margin(
    said: Sequence[Sequence[int]], expected: Sequence[Sequence[int]], margins: Sequence[Sequence[float]]
) -> tuple[float, int]:
    """The largest margin of the tokens at which texts first differ, and the number of tokens before these."""
    worst = 0.0
    same = 0
    for ours, theirs, gaps in zip(said, expected, margins, strict=True):
        split = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        same += len(theirs) if split is None else split
        worst = worst if split is None else float(np.maximum(worst, gaps[split]))  # NaN if one is
    return worst, same


def check_greedy(
    subject: str,
    said: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    margins: Sequence[Sequence[float]],
    tolerance: Tolerance,
) -> CheckResult:
    """Check text: greedy tokens agree with the reference's, or first differ where its margin is small."""
    (worst, same), total = largest_margin(said, expected, margins), sum(map(len, expected))
    enough = same >= tolerance.greedy_equal * total
    least = f", {tolerance.greedy_equal:.0%} at least" if tolerance.greedy_equal else ""
    detail = f"{same} of {total} tokens the same up to the first difference{least}"
    passed = worst <= tolerance.greedy_margin and enough
    metric = "the reference's margin where greedy text first differs"
    return CheckResult("text", subject, metric, worst, tolerance.greedy_margin, passed, detail)


def summary(
    results: Sequence[CheckResult], precision: str, quality_losses: list[dict[str, Any]], plan: Plan
) -> dict[str, Any]:
    """The content of verify.json without the cache figures."""
    checks = [asdict(r) for r in results]
    return {
        "passed": all(r.passed for r in results),
        "status": status_of(checks),
        "precision": precision,
        "replaced_layers": list(plan.layers),
        "checks": checks,
        "quality_loss": quality_losses,
    }


def proof(checks: Sequence[CheckResult], status: str) -> list[str]:
    """One sentence for each proven fact; a single sentence if a check failed.

    Args:
        checks: of both graphs, in the order of the ladder.
        status: see `records.results.status_of`.
    """
    if status == FAILED:
        return ["Nothing is proven: a check of the ladder failed."]
    return [said for said in (_wiring(checks), _exporter(checks), _shipped(checks)) if said]


def _worst(checks: Iterable[CheckResult]) -> CheckResult | None:
    return max((r for r in checks if r.value is not None), key=lambda r: r.value or 0.0, default=None)


def _wiring(checks: Sequence[CheckResult]) -> str:
    """The sentence of check nbl."""
    compared = [r for r in checks if r.check == "nbl"]
    worst = _worst(compared)
    if worst is None:
        return ""
    longest = next((r.detail for r in compared if "tokens in chunks" in r.detail), "")
    how = "prefill and cached steps, alone and as a batch" + (f", and {longest}" if longest else "")
    return (
        f"The NBL graph and the original graph with these layers put in differ by {worst.value:.1e} of the size of the "
        f"logits ({how}); {worst.tolerance:.0e} is allowed."
    )


def _exporter(checks: Sequence[CheckResult]) -> str:
    worst = _worst(r for r in checks if r.check == "exporter")
    if worst is None:
        return ""
    if worst.metric == PERPLEXITY:
        return f"The perplexity of the original graph is {worst.value:+.1%} of the torch model's ({worst.detail})."
    return f"The original graph and the torch model differ by {worst.value:.1e} of the size of the logits."


def _shipped(checks: Sequence[CheckResult]) -> str:
    worst = _worst(r for r in checks if r.check == "shipped")
    return (
        ""
        if worst is None
        else f"In the arithmetic that ships, which rounds activations, both differ by {worst.value:.1%}."
    )
