"""Runs the verification ladder on both graphs of a run, against one reference.

    original graph ─┬─ one pass, activations not rounded ──────────────► reference of original    exporter, original
                    ├─ the same, mixers in place of attention ─────────► reference of nbl         nbl
                    └─ in the arithmetic that ships, with the mixers ──► its greedy text          shipped, text

The mixers have the matrices that the NBL graph stores, so both sides have the same numbers at any precision. A
reference whose prompts stop below the highest layers has the steps of the graph that is compared.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.methods.base import Maps, Mixer
from nbl_export.methods.rows import continuing_tokens
from nbl_export.records.results import CheckResult
from nbl_export.targets.checks import stored_maps
from nbl_export.verify import ladder
from nbl_export.verify.ladder import LONG_CHUNK, Probe, Reference, greedy, run_chunks, run_long, run_rows
from nbl_export.verify.structure import VerificationContext, check_directory, unrounded_limit

__all__ = ["Verifier"]

_REFERENCE_CHUNK = 2 * LONG_CHUNK - 1  # other borders than those of the compared chunks


class Verifier:
    """Runs the checks of both graphs.

    Attributes:
        results: of the checks so far.
        references: by subject.
        said: greedy text of what ships by subject, a list of tokens a prompt.
        warnings: what is wrong with the exporter's original and does not fail the run, in sentences.
    """

    def __init__(self, verification: VerificationContext, probe: Probe, maps: Mapping[int, Mixer]) -> None:
        self.verification = verification
        self.probe = probe
        self.maps = maps
        self.results: list[CheckResult] = []
        self.references: dict[str, Reference] = {}
        self.said: dict[str, list[list[int]]] = {}
        self.warnings: list[str] = []

    def run(self, shipped: Mapping[str, Path], run: Mapping[str, Path]) -> None:
        """Run the checks of both graphs. A graph is closed before another is opened: each takes its weights in memory.

        Args:
            shipped: the deployed directories by subject. run: the directories that a CPU runs.
        """
        engine = self.verification.engine
        stored = stored_maps(engine.read_maps(shipped["nbl"]), self.maps)
        for subject, mixers in (("original", dict[int, Mixer]()), ("nbl", stored)):
            with self.verification.task(f"reference of {subject}"):
                self.references[subject] = self._reference(run["original"], mixers)
            self._compare(subject, shipped, run[subject])
            self._text(subject, run[subject])

    def _reference(self, original: Path, mixers: Maps) -> Reference:
        """Logits of the original graph with mixers, and greedy text in the arithmetic that ships."""
        verification = self.verification
        probe = self.probe
        opened = functools.partial(
            verification.engine.open_reference, original, verification.spec.head_dim, mixers, verification.plan.tap
        )
        decoder = opened(exact=True)
        truth = _fp32_reference(
            decoder, probe, stops=continuing_tokens(mixer.reads for mixer in mixers.values()) is not None
        )
        if verification.rounds:
            del decoder
            decoder = opened(exact=False)
            self._shipped = [run_rows(decoder, [row])[0] for row in probe.rows]
        texts = [greedy(decoder, prompt, probe.new_tokens) for prompt in probe.prompts]
        said = tuple(ids for ids, _ in texts)
        gaps = tuple(margins for _, margins in texts)
        return dataclasses.replace(truth, greedy=said, margins=gaps)

    def _compare(self, subject: str, shipped: Mapping[str, Path], run: Path) -> None:
        verification = self.verification
        probe = self.probe
        truth = self.references[subject]
        decoder = verification.engine.open_graph(run, verification.spec.head_dim, exact=True)
        wanted = verification.wanted(subject, self.maps)
        original = shipped["original"] if subject == "nbl" else None
        directory = check_directory(verification, shipped[subject], run, decoder, wanted, probe, original)
        limit = unrounded_limit(decoder)
        logits = ladder.check_logits(subject, subject, decoder, probe, truth, limit)
        if probe.long:
            logits += ladder.check_long(subject, subject, decoder, probe.long, truth, limit)
        del decoder
        self.results += directory() + logits
        if verification.rounds and subject == "nbl":
            decoder = verification.engine.open_graph(run, verification.spec.head_dim)
            pairs = [(run_rows(decoder, [row])[0], right) for row, right in zip(probe.rows, self._shipped, strict=True)]
            self.results += ladder.judge("shipped", subject, "one sequence", pairs, verification.tolerance.limit)

    def _text(self, subject: str, run: Path) -> None:
        """Check text. The original's is reported: a near-tie of the original says nothing of the rewrite."""
        truth = self.references[subject]
        tolerance = self.verification.tolerance
        if not truth.greedy:
            return
        with self.verification.engine.open_checked(run) as runner:
            said = [runner.greedy(prompt, self.probe.new_tokens) for prompt in self.probe.prompts]
        self.said[subject] = said
        result = ladder.check_greedy(subject, said, truth.greedy, truth.margins, tolerance)
        if subject == "original" and result.value is not None:  # a margin that is not finite fails
            if not result.passed:
                self.warnings.append(
                    f"greedy text of the original differs from its graph's at a margin of {result.value:.2g}, "
                    f"{result.tolerance:g} is usual ({result.detail})"
                )
            result = dataclasses.replace(result, tolerance=None, passed=True)
        self.results.append(result)


def _fp32_reference(decoder: Any, probe: Probe, *, stops: bool) -> Reference:
    """Logits of a decoder on a probe; it may have other steps than what is compared, unless prompts stop below
    the highest layers."""
    if stops:
        long = run_long(decoder, probe.long) if probe.long else None
        rows = tuple(run_rows(decoder, [row])[0] for row in probe.rows)
        return Reference(rows, long, continuing=tuple(run_rows(decoder, probe.continuing)) if probe.continuing else ())
    starts = range(0, len(probe.long), _REFERENCE_CHUNK)
    long = run_chunks(decoder, probe.long, starts) if probe.long else None
    return Reference(tuple(_one_pass(decoder, row) for row in probe.rows), long)


def _one_pass(decoder: Any, row: Any) -> np.ndarray:
    decoder.begin(1)
    logits: np.ndarray = decoder.step(np.asarray([row]))[0]
    return logits
