"""How both graphs of a run were made, and the check of their files, of their caches and of their pruned tails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.methods import cache_layers
from nbl_export.methods.rows import continuing_tokens
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.plan import Plan
from nbl_export.records.results import YES_NO, CheckResult
from nbl_export.targets.base import Engine
from nbl_export.targets.checks import ExpectedGraph
from nbl_export.verify.ladder import TOLERANCES, Probe, Tolerance
from nbl_export.verify.last_token import check_last, expected_last

__all__ = ["VerificationContext", "check_directory"]


@dataclass(frozen=True)
class VerificationContext:
    """Engine, decoder and plan, and how the graphs were made.

    Attributes:
        precision, logits: of the shipped graphs; logits are "last" or "all".
        cache_length: most tokens of a sequence.
        task: takes a title and returns a context; its value reports progress.
    """

    engine: Engine
    spec: DecoderSpec
    plan: Plan
    precision: str
    logits: str
    cache_length: int
    task: Callable[[str], AbstractContextManager[Callable[[int, int], None]]]

    @property
    def static(self) -> bool:
        """Whether graphs have the static form, see `Capabilities`."""
        return self.engine.capabilities.static

    @property
    def arithmetic(self) -> str:
        """What the decoder of check text computes in, a key of `TOLERANCES`."""
        able = self.engine.capabilities
        if able.static:
            return "fp32"
        return "narrow" if able.narrow and self.precision != "fp32" else self.precision

    @property
    def rounds(self) -> bool:
        """Whether the arithmetic that ships is coarser than the types of the graph."""
        return self.arithmetic in ("int8", "int4", "narrow")

    @property
    def tolerance(self) -> Tolerance:
        """The limits of the arithmetic that ships."""
        return TOLERANCES[self.arithmetic]

    def wanted(self, subject: str, maps: Mapping[int, Any]) -> ExpectedGraph:
        """What a subject's graph has to be."""
        maps = {} if subject == "original" else maps
        kept = cache_layers(self.plan) if subject == "nbl" else tuple(range(self.plan.num_layers))
        return ExpectedGraph(subject, self.spec, self.precision, self.logits, kept, maps)


def unrounded_limit(decoder: Any) -> float:
    """The limit of logits for a decoder that does not round activations: that of its caches' type."""
    caches = {a.dtype for a in decoder.contract.inputs if a.name.startswith("past_key_values.")}
    return TOLERANCES["fp16" if "float16" in caches else "fp32"].limit


def check_directory(
    verification: VerificationContext,
    shipped: Path,
    run: Path,
    decoder: Any,
    wanted: ExpectedGraph,
    probe: Probe,
    original: Path | None,
) -> Callable[[], list[CheckResult]]:
    """Checks structure and last_token: reads `decoder` now, and gives the rest of the work, for when it is closed.

    Args:
        shipped: the directory that is deployed. run: the directory that a CPU runs, see `Engine.write_float32`.
        decoder: of `run`, of the graph with the most logits.
        original: see `Engine.check`.
    """
    engine = verification.engine
    head_dim = verification.spec.head_dim
    file = verification.engine.pruned_file(run)
    subject = wanted.subject
    row = probe.rows[0]
    contract = decoder.contract
    continuing = continuing_tokens(mixer.reads for mixer in wanted.maps.values())
    expected = [] if file is None else expected_last(decoder, row, unrounded_limit(decoder), continuing)
    cache = _measured_cache(subject, decoder, head_dim)

    def check() -> list[CheckResult]:
        if file is None:
            return [*engine.check(shipped, contract, wanted, original), cache]
        last = engine.open_graph(run, head_dim, file, exact=True)
        results = engine.check(shipped, last.contract, wanted, original)
        return [*results, *check_last(subject, expected, last, row, continuing), cache]

    return check


def _measured_cache(subject: str, decoder: Any, head_dim: int) -> CheckResult:
    """Compare the cache bytes that a running session holds for two sequences with the contract's."""
    decoder.begin(2)
    decoder.step(np.zeros((2, 1), np.int64))
    held = decoder.cache_bytes // (2 * decoder.cache_length)
    stated = decoder.contract.cache_bytes_per_token(head_dim)
    detail = f"{held} bytes a token held after a step, {stated} by contract"
    metric = "cache bytes in the running session"
    return CheckResult("structure", subject, metric, float(held != stated), YES_NO, held == stated, detail)
