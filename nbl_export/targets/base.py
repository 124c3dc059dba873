"""What a target is: an engine with its files. Capabilities are data; a probe has a known answer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from nbl_export.graph.names import ALL_LOGITS_FILE, GRAPH_FILE
from nbl_export.methods import method_of
from nbl_export.methods.base import Mixer
from nbl_export.records.capabilities import Capabilities
from nbl_export.records.decoder import GraphContract
from nbl_export.records.results import CheckResult
from nbl_export.targets.checks import ExpectedGraph, StoredWeights
from nbl_export.targets.runners import GraphDecoder, StepDecoder, TextRunner

__all__ = [
    "Availability",
    "BuildSettings",
    "Builds",
    "DecoderFacts",
    "Deployable",
    "Engine",
    "ExportSettings",
    "Target",
    "compiler",
    "default_threads",
    "threads_of",
]


@dataclass(frozen=True)
class Availability:
    """Answer of a probe; `reason` says what was found, or what is missing and how to get it."""

    available: bool
    reason: str


@dataclass(frozen=True)
class BuildSettings:
    """What a plan is built for."""

    max_batch: int = 1
    prefill_chunk: int = 512


@dataclass(frozen=True)
class DecoderFacts:
    """Sizes of a deployed decoder, read from its files.

    Attributes:
        head_dim: size of a head, used if a graph only names that dimension of its caches.
        cache_bytes_per_token: of one sequence.
    """

    vocab_size: int
    context_length: int
    head_dim: int
    cache_bytes_per_token: int


@dataclass(frozen=True)
class ExportSettings:
    """How the original graph is made.

    Attributes:
        source: the exporter, one of `Capabilities.sources`.
        cache_length: tokens of a fixed cache, for graphs of the static form.
        builder_options: further options of the GenAI builder, as key=value.
        codes: a quantised checkpoint whose codes the graph gets.
        rows_BT: token ids of a text, for a precision that rounds activations by what they usually are.
    """

    source: str
    precision: str
    cache_length: int = 0
    builder_options: tuple[str, ...] = ()
    codes: Path | None = None
    rows_BT: Any = None


class Target:
    """The graphs of an engine: exports a decoder, puts maps into it, and opens it for verification.

    Attributes:
        capabilities: what differs between targets, as data.
    """

    capabilities: Capabilities

    def probe(self, *, run: bool = False) -> Availability:
        """Whether directories can be exported and verified here, by a known answer. Never raises.

        Args:
            run: whether exported directories run here instead.
        """
        raise NotImplementedError

    def export(self, checkpoint: Path, out: Path, settings: ExportSettings) -> None:
        """Write the original decoder of a checkpoint directory to `out`.

        Raises:
            NblError: the exporter refuses the checkpoint or the precision; the message has the reason.
        """
        raise NotImplementedError

    def linearize(self, original: Path, out: Path, maps: Mapping[int, Mixer], tap: str = "residual") -> None:
        """Write the NBL version of `original` to `out`, which must not exist.

        Args:
            maps: layer -> its mixer. tap: what mixers act on (`records.plan.TAPS`).

        Raises:
            RefusalError: the graph is not understood.
        """
        from nbl_export.methods.rewrite import rewrite

        rewrite(original, out, maps, tap)

    def keep_last_token(self, directory: Path) -> None:
        """Make the graph give the logits of the last token; the graph with all logits stays beside it.

        Raises:
            RefusalError: the tail of this graph cannot be pruned; no file has changed.
        """
        from nbl_export.graph.passes.tail import keep_last_token

        keep_last_token(directory)

    def check(
        self, directory: Path, contract: GraphContract, wanted: ExpectedGraph, original: Path | None
    ) -> list[CheckResult]:
        """Check structure: valid files, inputs and outputs, caches, maps as fitted, and a graph that is pruned.

        Args:
            contract: of the graph that ships, as `open_graph` opens it with `exact`.
            original: has every weight of the directory apart from the maps; None checks no weight.
        """
        from nbl_export.targets import onnx_files

        return onnx_files.check(directory, contract, wanted, original)

    def read_maps(self, directory: Path) -> StoredWeights:
        """What the graph of a directory holds of mixers."""
        from nbl_export.targets import onnx_files

        return onnx_files.read_maps(directory)

    def open_graph(
        self,
        directory: Path,
        head_dim: int,
        file: str | None = None,
        threads: int | None = None,
        *,
        exact: bool = False,
    ) -> GraphDecoder:
        """The graph for verification and scores: the graph with all logits, unless `file` names another.

        Args:
            exact: in the arithmetic that the graph's own types state; no activation is rounded.
        """
        raise NotImplementedError

    def open_reference(
        self, directory: Path, head_dim: int, mixers: Mapping[int, Mixer], tap: str, *, exact: bool
    ) -> StepDecoder:
        """The graph with all logits, with mixers in place of attention, computed without the rewrite.

        Args:
            exact: as in `open_graph`.

        Raises:
            RefusalError: a layer is not understood, or has no such tap.
        """
        decoder: StepDecoder = method_of(mixers).reference(directory, head_dim, mixers, tap, fp32_activations=exact)
        return decoder

    def pruned_file(self, directory: Path) -> str | None:
        """The graph that ships, if the graph with all logits stays beside it."""
        return GRAPH_FILE if (directory / ALL_LOGITS_FILE).is_file() else None


class Deployable:
    """The directories that an engine runs."""

    def owns(self, path: Path) -> bool:
        """Whether this target runs a deployable directory."""
        raise NotImplementedError

    def facts(self, path: Path) -> DecoderFacts:
        """Sizes of a deployable directory that the target owns.

        Raises:
            NblError: a file is missing or damaged, or the decoder cannot be measured by single steps.
        """
        raise NotImplementedError

    def arithmetic(self, path: Path) -> str:
        """What the target computes in, and keeps keys and values in, in words; "" if the graph's own types say it."""
        return ""

    def open_runner(self, path: Path, threads: int | None = None) -> TextRunner:
        """A runner on the deployed decoder."""
        raise NotImplementedError

    def open_checked(self, directory: Path, threads: int | None = None) -> TextRunner:
        """A runner on the deployed decoder or on its float32 copy, on a CPU, for verification."""
        return self.open_runner(directory, threads)


class Engine(Target, Deployable):
    """A target that runs what it exports."""


class Builds(Engine):
    """An engine that compiles graphs of the static form."""

    def library_version(self) -> str:
        """Version of the installed compiler, without loading it; "" if there is none."""
        raise NotImplementedError

    def build(self, source: Path, out: Path, settings: BuildSettings) -> dict[str, Any]:
        """Compile the graph in `source` into the directory `out`; returns the record."""
        raise NotImplementedError

    def write_float32(self, directory: Path, out: Path) -> None:
        """Write a float32 copy of a directory's graphs, which a CPU runs, for graphs of the static form."""
        raise NotImplementedError


def compiler(engine: Target) -> Builds:
    """The engine, whose capabilities say that it compiles (`Capabilities.static`)."""
    assert isinstance(engine, Builds)
    return engine


def threads_of(engine: Target) -> int:
    """Default number of threads of an engine; 1 if the host only feeds a GPU."""
    return 1 if engine.capabilities.needs_target_gpu else default_threads()


def default_threads() -> int:
    """Number of physical cores this process may use, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))
