"""Results of verification and measurement."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.records.from_json import read_record, require

__all__ = ["FAILED", "VERIFIED", "YES_NO", "CheckResult", "Scenario", "Timing", "describe_background", "status_of"]

VERIFIED = "verified"
FAILED = "failed"
YES_NO = 0.5  # tolerance of a check without a figure: its value is 0 if it passed, else 1


@dataclass(frozen=True)
class CheckResult:
    """One check of the verification ladder: the measured value and its tolerance.

    value None means not finite. tolerance None means that the value is reported but not gated.
    """

    check: str
    subject: str
    metric: str
    value: float | None
    tolerance: float | None
    passed: bool
    detail: str = ""

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            require(not self.passed, "a figure that is not finite does not pass")
            object.__setattr__(self, "value", None)  # JSON has no NaN


def status_of(checks: Sequence[Mapping[str, Any]]) -> str:
    """The status of a verification: `VERIFIED`, or `FAILED` if a check failed."""
    return VERIFIED if all(check["passed"] for check in checks) else FAILED


@dataclass(frozen=True)
class Scenario:
    """One benchmark row in llama-bench's terms, behind `depth` cached tokens.

    pp<T> is prefill of T tokens, tg<T> is decode of T tokens.
    """

    kind: str
    tokens: int
    depth: int

    def __post_init__(self) -> None:
        require(self.kind in ("pp", "tg"), f"unknown test kind {self.kind!r}")
        require(self.tokens >= 1 and self.depth >= 0, "tokens are positive, depth is not negative")

    @property
    def test(self) -> str:
        return f"{self.kind}{self.tokens}"

    def facts(self) -> dict[str, Any]:
        """The fields, and the name of the test."""
        return {"test": self.test, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Timing:
    """All repetitions of one scenario on one variant, in nanoseconds, in running order.

    Attributes:
        loads: the load of the decoders that each repetition ran on. Repetitions of one load are not independent.
        first_token_ns: time to pick the first token after a prefill.
        token_ns: time of each step of a decode.
    """

    scenario: Scenario
    variant: str
    samples_ns: tuple[int, ...]
    loads: tuple[int, ...] = ()
    first_token_ns: tuple[int, ...] = ()
    token_ns: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Timing:
        """The timing of a row of bench.json."""

        def taken(kind: Any) -> dict[str, Any]:
            return {name: row[name] for name in kind.__dataclass_fields__ if name in row}

        return read_record(cls, {**taken(cls), "scenario": read_record(Scenario, taken(Scenario))})

    def to_json(self) -> dict[str, Any]:
        """A row of bench.json: raw nanoseconds."""
        raw = {
            "samples_ns": list(self.samples_ns),
            "loads": list(self.loads),
            "first_token_ns": list(self.first_token_ns),
            "token_ns": [list(run) for run in self.token_ns],
        }
        return {**self.scenario.facts(), "variant": self.variant, **{k: v for k, v in raw.items() if v}}

    def figures(self) -> dict[str, Any]:
        """A row of report.json: tokens per second and latency; None if not measured.

        ttft_seconds: time to first token, the median of prefill plus the pick of the next token.
        tpot_seconds: time per output token, p50, p95 and p99 of the steps of all repetitions, interpolated linearly.
        """
        rates = [self.scenario.tokens * 1e9 / ns for ns in self.samples_ns]
        firsts = [prefill + pick for prefill, pick in zip(self.samples_ns, self.first_token_ns, strict=False)]
        steps = [ns for run in self.token_ns for ns in run]
        return {
            **self.scenario.facts(),
            "variant": self.variant,
            "tokens_per_second_median": statistics.median(rates),
            "tokens_per_second_stdev": statistics.stdev(rates) if len(rates) > 1 else 0.0,
            "samples": rates,
            "loads": list(self.loads),
            "ttft_seconds": statistics.median(firsts) / 1e9 if firsts else None,
            "tpot_seconds": {f"p{q}": float(np.percentile(steps, q)) / 1e9 for q in (50, 95, 99)} if steps else None,
        }


def describe_background(found: Mapping[str, Any]) -> str:
    """The value of `measure.instruments.background_of` in words that continue "speed was", without a full stop."""
    if found["others"] is None:
        words = "measured on a machine that does not count the processor time of other processes"
    else:
        where = "on a busy machine:" if found["busy"] else "while"
        cores = f"{found['cores']} core{'' if found['cores'] == 1 else 's'}"
        stolen = f", and its host took {_cores(found['stolen'])} more" if found["stolen"] >= 0.01 else ""
        words = f"measured {where} other processes used {_cores(found['others'])} of {cores}{stolen}"
    if found["gave_up"]:
        words += f"; {found['gave_up']} of {found['waits']} runs began while threads of the previous run still computed"
    return words


def _cores(count: float) -> str:
    return f"{count:.2g}" if count < 10 else f"{count:.0f}"
