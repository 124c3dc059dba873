"""The verification ladder: does the exported graph compute what the torch model computes?

    structure    the file (`forms`): valid, contract and cache bytes as predicted, maps as fitted, other weights
                 unchanged; codes match the checkpoint's matrices, kernels multiply by the codes (`codes`)
    original     original graph against the original torch model
    nbl          NBL graph against the NBL torch model: prefill and cached steps, a batch of two lengths, one long row
    text         greedy text of the shipped runtime against torch
    quality      quality loss (`perplexity`): NBL against original on held-back text; reported, not gated
    last_token   a shipped graph with the logits of the last token alone against the graph with all logits
    quantised    a quantised graph against the reference of its float32 twin: what is left is rounding of activations

A graph with int4 or int8 matrices takes the checks original and nbl as its float32 twin, a float32 copy of the same
graph. The torch model then has the graph's matrices, so the structure is proven to float32 accuracy at every precision.
The checks original, nbl, quality and quantised need the logits of all positions; text and last_token run what ships.

One table of tolerances by precision decides every check.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nbl_export.records.plan import Plan
from nbl_export.records.results import COMPARED, FAILED, CheckResult, status_of
from nbl_export.verify.codes import DISTANCE, NEARNESS, PRODUCTS, TWIN

__all__ = [
    "DECODE_STEPS",
    "LONG_CHUNK",
    "NARROW",
    "ON_GPU",
    "TOLERANCES",
    "Probe",
    "Reference",
    "Tolerance",
    "apart",
    "check_greedy",
    "check_logits",
    "check_long",
    "greedy",
    "judge",
    "proof",
    "run_rows",
    "shown_positions",
]


DECODE_STEPS = 16
LONG_CHUNK = 512  # tokens of a long row that are appended at once
_SHOWN_EVERY, _SHOWN_LAST = 8, 64  # compared positions of a long row's prefill: every 8th, and the last 64
# The noise probe rounds at one place, two float32 engines at hundreds. Measured ratios are 1 to 13.
NOISE_FACTOR = 16.0


@dataclass(frozen=True)
class Tolerance:
    """The limits of a precision.

    metric: "max_abs" (largest logit difference) or "relative_rms" (rms of the difference over rms of the logits).
    limit: for original, nbl and quantised. ratio: the figure of nbl may be at most this many times that of original
        (None: no such rule).
    greedy_margin: a greedy token may differ if torch's two best logits are closer than this.
    greedy_equal: smallest share of equal greedy tokens, counted up to the first difference of each text.
    """

    metric: str
    limit: float
    ratio: float | None
    greedy_margin: float
    greedy_equal: float = 0.0


# fp32: agreement of two float32 implementations of the same graph; the twins of quantised graphs have this limit too.
# fp16: the yardstick is the original graph's own error (original). int8 and int4: quantised; both sides have the same
# matrices, and kernels round activations to 8 bits. Measured: bench/results/twins.json.
TOLERANCES = {
    "fp32": Tolerance("max_abs", 1e-3, None, 1e-2, 0.5),
    "fp16": Tolerance("relative_rms", 0.02, 2.0, 0.5),
    "int8": Tolerance("relative_rms", 0.1, None, 1.0),
    "int4": Tolerance("relative_rms", 0.1, None, 1.0),
}
# For a quantised graph without a twin, compared with torch directly. The quantisation noise hides small faults.
WITHOUT_TWIN = {"int8": Tolerance("relative_rms", 0.1, 1.5, 1.0), "int4": Tolerance("relative_rms", 0.75, 1.5, 4.0)}
# An engine that computes in bfloat16 with keys and values in 8 or 16 bits, compared with the model that has the graph's
# matrices. The original graph's own error is the yardstick.
NARROW = {precision: Tolerance("relative_rms", 0.1, 2.0, 1.0) for precision in ("fp16", "int8", "int4")}
# `accept`: an engine on its GPU against the reference of the ladder. No GPU has been measured. fp16: as above.
# The original's engine is the yardstick, since NBL has the same arithmetic in fewer layers. bf16 rounds 8 times as
# coarsely as fp16; its limit is an estimate for 30 layers. int4: shipped scales are fp16, those of the twin float32.
# On ONNX Runtime's CPU provider the tiny Mistral of the tests is at 0.001 with fp16 and at 0.033 with int4.
ON_GPU = {
    "fp32": Tolerance("relative_rms", 1e-3, 2.0, 0.5),
    "fp16": Tolerance("relative_rms", 0.02, 2.0, 0.5),
    "bf16": Tolerance("relative_rms", 0.06, 2.0, 0.5),
    "int8": Tolerance("relative_rms", 0.1, 2.0, 1.0),
    "int4": Tolerance("relative_rms", 0.1, 2.0, 1.0),
}


@dataclass(frozen=True)
class Probe:
    """Held-back token ids for the comparison: two rows of different length, each followed by forced decode steps.

    prompts, new_tokens: of greedy text. long: one row, prefilled in chunks and followed by decode steps.
    """

    rows: tuple[tuple[int, ...], ...]
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    long: tuple[int, ...] = ()


def shown_positions(length: int) -> np.ndarray:
    """Ascending positions of a long row whose logits are compared; the decode steps come last."""
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
    check: str,
    subject: str,
    decoder: Any,
    rows: Sequence[Sequence[int]],
    truth: Reference,
    tolerance: Tolerance,
    yardstick: float | None = None,
) -> list[CheckResult]:
    """Compare logits of prefill and of cached steps with a reference, each row alone and as a batch.

    With the max_abs metric, a position may differ by the limit or by NOISE_FACTOR times the reference's noise at that
    position. The larger of the two applies.

    Args:
        yardstick: check original's largest figure, if the precision has a ratio rule.
    """
    results: list[CheckResult] = []
    for name, got in (
        ("one sequence", [run_rows(decoder, [row])[0] for row in rows]),
        ("batch of 2, different lengths", run_rows(decoder, rows)),
    ):
        judged = list(zip(got, truth.logits, truth.noise, strict=True))
        results += judge(check, subject, name, judged, tolerance, yardstick)
    return results


def check_long(
    check: str,
    subject: str,
    decoder: Any,
    row: Sequence[int],
    truth: Reference,
    tolerance: Tolerance,
    yardstick: float | None = None,
) -> list[CheckResult]:
    """Like `check_logits` for one long row in chunks, at `shown_positions`.

    Only a long row has large rotary angles and full attention windows.
    """
    name = f"one sequence of {len(row)} tokens in chunks of {LONG_CHUNK}"
    assert truth.long is not None and truth.long_noise is not None
    return judge(check, subject, name, [(run_long(decoder, row), truth.long, truth.long_noise)], tolerance, yardstick)


def judge(
    check: str, subject: str, name: str, rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    tolerance: Tolerance, yardstick: float | None,
) -> list[CheckResult]:  # fmt: skip
    """One result for prefill and one for decode, of the worst row.

    Args:
        rows: what was got, what is expected and its noise; the last `DECODE_STEPS` positions are decode.
    """
    limit = tolerance.limit
    if yardstick is not None and tolerance.ratio is not None:
        limit = min(limit, max(yardstick * tolerance.ratio, 1e-4))
    distance = _max_abs if tolerance.metric == "max_abs" else _relative_rms
    results = []
    for part, cut in (("prefill", slice(None, -DECODE_STEPS)), ("decode", slice(-DECODE_STEPS, None))):
        judged = [distance(g[cut], e[cut], n[cut], limit) for g, e, n in rows]
        value, allowed, loose = max(judged, key=lambda j: j[0] / j[1] if np.isfinite(j[0]) else np.inf)
        passed = bool(np.isfinite(value) and value <= allowed)
        metric = f"{tolerance.metric.replace('_', ' ')} logit difference, {part}"
        detail = f"{name}; {loose} positions whose float32 noise allows more than {limit:g}" if loose else name
        results.append(CheckResult(check, subject, metric, value, allowed, passed, detail))
    return results


def _max_abs(got: np.ndarray, expected: np.ndarray, noise: np.ndarray, limit: float) -> tuple[float, float, int]:
    """The worst position's difference and its limit, and the number of positions with a limit above `limit`."""
    seen = np.abs(got.astype(np.float64) - expected).max(1)
    allowed = np.maximum(limit, NOISE_FACTOR * noise.astype(np.float64))
    worst = int(np.argmax(np.where(np.isfinite(seen), seen, np.inf) / allowed))
    return float(seen[worst]), float(allowed[worst]), int((allowed > limit).sum())


def _relative_rms(got: np.ndarray, expected: np.ndarray, _noise: np.ndarray, limit: float) -> tuple[float, float, int]:
    return apart(expected, got, "relative_rms"), limit, 0


def apart(right: np.ndarray, found: np.ndarray, metric: str) -> float:
    """The difference of logits in a metric of `Tolerance`."""
    away = found.astype(np.float64) - right
    if metric == "max_abs":
        return float(np.abs(away).max())
    return float(np.sqrt(np.square(away).mean() / np.square(right, dtype=np.float64).mean()))


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


def check_greedy(
    subject: str,
    said: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    margins: Sequence[Sequence[float]],
    tolerance: Tolerance,
    what: str = "",
) -> CheckResult:
    """Check text: greedy tokens agree with torch's, or first differ at a token whose margin in torch is small.

    Args:
        what: name of the graph that made the tokens; "" is the shipped graph.
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
    return CheckResult(
        "text", subject, metric, worst, limit, worst <= limit and enough, f"{what}; {detail}" if what else detail
    )


def summary(
    results: Sequence[CheckResult], precision: str, quality_losses: list[dict[str, Any]], plan: Plan
) -> dict[str, Any]:
    """The content of verify.json without the cache figures."""
    checks = [asdict(r) for r in results]
    return {
        "passed": all(r.passed for r in results),
        "status": status_of(precision, checks),
        "precision": precision,
        "replaced_layers": list(plan.layers),
        "checks": checks,
        "quality_loss": quality_losses,
    }


@dataclass(frozen=True)
class Reference:
    """What a graph is compared with.

    Teacher-forced logits of each row, [length, V] float32, and greedy continuations of the prompts.

    `noise` [length] is the largest change of each position's logits if the embeddings are perturbed by a few float32
    roundings. Two correct float32 engines can differ by a multiple of this noise. The noise is small everywhere in an
    ordinary model. It is large at tokens on the edge of a massive activation (half an attention sink). Linearized
    early layers make such tokens more frequent. The noise is zero until it is measured, and then `noisy` is true.

    `margins` are the gaps between the best and second-best logit at each greedy step. If a gap is below the numerical
    noise, another engine may choose the other token.

    `long` [positions, V] and `long_noise` belong to the long row, at `ladder.shown_positions`.

    The torch model (`torch_reference`) makes a reference.
    """

    logits: tuple[np.ndarray, ...]
    noise: tuple[np.ndarray, ...]
    greedy: tuple[tuple[int, ...], ...]
    margins: tuple[tuple[float, ...], ...]
    long: np.ndarray | None = None
    long_noise: np.ndarray | None = None
    noisy: bool = False

    @classmethod
    def without_noise(
        cls,
        logits: tuple[np.ndarray, ...],
        greedy: tuple[tuple[int, ...], ...],
        margins: tuple[tuple[float, ...], ...],
        long: np.ndarray | None = None,
    ) -> Reference:
        """A reference whose noise is not measured."""
        noise = tuple(np.zeros(len(row), np.float32) for row in logits)
        return cls(logits, noise, greedy, margins, long, None if long is None else np.zeros(len(long), np.float32))

    @property
    def quiet(self) -> Reference:
        """The same reference without noise."""
        return Reference.without_noise(self.logits, self.greedy, self.margins, self.long)


def proof(checks: Sequence[CheckResult], reference: str, status: str) -> list[str]:
    """One sentence for each proven fact; a single sentence if a check failed.

    Args:
        checks: of both graphs, in the order of the ladder.
        reference: what the graphs are compared with, in words.
        status: see `records.results.status_of`.
    """
    if status == FAILED:
        return ["Nothing is proven: a check of the ladder failed."]
    limits = [_NOT_PROVEN] if status == COMPARED else []
    return [said for said in (*limits, _wiring(checks, reference), *_codes(checks), _shipped(checks)) if said]


_NOT_PROVEN = (
    "This quantised graph was compared, but its wiring is not proven: no float32 twin was checked, and a fault smaller "
    "than the allowed difference does not show."
)


def _worst(checks: Iterable[CheckResult]) -> CheckResult | None:
    return max((r for r in checks if r.value is not None), key=lambda r: r.value or 0.0, default=None)


def _wiring(checks: Sequence[CheckResult], reference: str) -> str:
    """The sentence of check nbl."""
    compared = [r for r in checks if r.check == "nbl" and "logit" in r.metric]
    exact = _worst(r for r in compared if r.metric.startswith("max abs"))
    coded = any(r.metric == PRODUCTS for r in checks)
    longest = next((r.detail.split(";")[0] for r in compared if "tokens in chunks" in r.detail), "")
    how = "prefill and cached steps, alone and as a batch" + (f", and {longest}" if longest else "")
    if exact is not None:
        what = "the float32 twin of the NBL graph" if coded else "the NBL graph"
        return f"{what[0].upper()}{what[1:]} and {reference} differ by at most {exact.value:.1e} in any logit ({how})."
    coarse = _worst(compared)
    if coarse is None:
        return ""
    return (
        f"The NBL graph and {reference} differ by {coarse.value:.1%} of the size of the logits ({how}); "
        f"an error below {coarse.tolerance:.1%} would pass."
    )


def _codes(checks: Sequence[CheckResult]) -> list[str]:
    said = [f"Float32 twin: {r.detail}." for r in checks if r.metric == TWIN]
    near, kernels = _worst(r for r in checks if r.metric == NEARNESS), _worst(r for r in checks if r.metric == PRODUCTS)
    if near is not None:
        from_elsewhere = "" if near.tolerance is not None else "; its codes came from another tool"
        said.append(f"Every quantised matrix lies within {near.value:.2f} steps of the model's{from_elsewhere}.")
    if kernels is not None:
        said.append(
            f"Every quantised product multiplies by its codes, to {kernels.value:.0e} of the sum of their magnitudes."
        )
    return said


def _shipped(checks: Sequence[CheckResult]) -> str:
    ships = _worst(r for r in checks if r.check == "quantised" and r.metric != DISTANCE)
    before = _worst(r for r in checks if r.metric == DISTANCE)
    if ships is None or before is None:
        return ""
    return (
        f"The shipped graph differs from this reference by {ships.value:.1%} of the size of the logits, because it "
        f"rounds activations; rounding the matrices moved the logits by {before.value:.0%}."
    )
