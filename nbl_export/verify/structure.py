"""Structure of a graph's files, which its target checks, and the check of a pair of graphs on the same caches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import RefusalError
from nbl_export.mixers import cache_layers
from nbl_export.mixers.base import state_of
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.plan import Plan
from nbl_export.records.results import YES_NO, CheckResult
from nbl_export.targets.base import Target
from nbl_export.targets.checks import Coded, Wanted
from nbl_export.verify.codes import TWIN
from nbl_export.verify.ladder import Probe
from nbl_export.verify.last_token import check_last

__all__ = ["Setting", "check_directory", "coded_graphs"]


@dataclass(frozen=True)
class Setting:
    """Target, decoder and plan, and how the graphs were made.

    Attributes:
        precision, logits: of the shipped graphs; logits are "last" or "all".
        cache_length: most tokens of a sequence.
        nearness: most steps between codes and their matrices; None for another tool's codes.
        task: takes a title and returns a context; its value reports progress.
    """

    engine: Target
    spec: DecoderSpec
    plan: Plan
    precision: str
    logits: str
    cache_length: int
    nearness: float | None
    task: Callable[[str], AbstractContextManager[Callable[[int, int], None]]]

    @property
    def static(self) -> bool:
        """Whether graphs have the static form, see `Capabilities`."""
        return self.engine.capabilities.static

    @property
    def narrow(self) -> bool:
        """Whether the engine computes in fewer bits than the graph's types state."""
        return self.engine.capabilities.narrow and self.precision != "fp32"

    def wanted(self, subject: str, maps: Mapping[int, Any]) -> Wanted:
        """What a subject's graph has to be."""
        if subject == "original":
            maps = {}
        kept = cache_layers(self.plan) if subject == "nbl" else tuple(range(self.plan.num_layers))
        return Wanted(subject, self.spec, self.precision, self.logits, kept, maps)


def check_directory(
    setting: Setting, directory: Path, decoder: Any, wanted: Wanted, probe: Probe, precision: str
) -> list[CheckResult]:
    """Checks structure and last_token.

    Args:
        decoder: of the graph with the most logits. precision: of this graph.
    """
    engine, head_dim = setting.engine, setting.spec.head_dim
    if engine.capabilities.narrow:
        decoder, precision = engine.open_exact(directory, head_dim), "fp32"
    pruned = engine.pruned_file(directory)
    shipped = decoder if pruned is None else engine.open_exact(directory, head_dim, pruned)
    results = engine.check_files(directory, shipped.contract, wanted)
    if pruned is not None:
        remembers = any(state_of(mixer) is not None for mixer in wanted.maps.values())
        long = probe.long if remembers else ()
        results += check_last(wanted.subject, decoder, shipped, probe.rows[0], precision, long)
    return [*results, _measured_cache(wanted.subject, decoder, head_dim)]


def _measured_cache(subject: str, decoder: Any, head_dim: int) -> CheckResult:
    """Compare the cache bytes that a running session holds for two sequences with the contract's."""
    decoder.begin(2)
    decoder.step(np.zeros((2, 1), np.int64))
    held = decoder.cache_bytes // (2 * decoder.cache_length)
    stated = decoder.contract.cache_bytes_per_token(head_dim)
    detail = f"{held} bytes a token held after a step, {stated} by contract"
    metric = "cache bytes in the running session"
    return CheckResult("structure", subject, metric, float(held != stated), YES_NO, held == stated, detail)


def coded_graphs(
    setting: Setting, directories: Mapping[str, Path], results: list[CheckResult], scratch: Path
) -> dict[str, Coded]:
    """The graphs with quantised matrices by subject, with their float32 twins.

    The result is empty if no matrix is quantised. It is also empty if no twin can be made; `results` then says why.

    Args:
        scratch: directory of the twins; it must exist as long as the returned objects are used.
    """
    found: dict[str, Coded] = {}
    try:
        for subject, directory in directories.items():
            task = functools.partial(setting.task, f"float32 twin of {subject}")
            coded = setting.engine.coded(directory, scratch / subject, setting.spec.head_dim, task)
            if coded is None:
                return {}
            found[subject] = coded
    except RefusalError as error:
        detail = f"none can be made: {error.reason}; the quantised graph itself is compared with the model"
        results.append(CheckResult("structure", "nbl", TWIN, None, None, True, detail))
        return {}
    return found
