"""What an engine is: its capabilities as data, a probe with a known answer, and a runner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nbl_export.records.decoder import DecoderSpec, GraphContract
from nbl_export.records.proposers import Proposer

__all__ = [
    "Availability",
    "BuildSettings",
    "Built",
    "Capabilities",
    "Compiler",
    "Draft",
    "Engine",
    "Generation",
    "GraphDecoder",
    "ProposingRunner",
    "Room",
    "TextRunner",
]


@dataclass(frozen=True)
class Capabilities:
    """What differs between engines; no other code asks for an engine's name.

    Attributes:
        precisions: values of `--precision`, the default first.
        sources: decoder sources whose graphs the engine takes, the default first.
        extra: optional extra that installs the engine.
        cache_bytes: precision -> bytes of a cache element; 4 if it is not named.
        graphs: format of the decoder graphs, "onnx" or "ir" (OpenVINO).
        static: whether the engine compiles graphs of the static form, with caches of --max-seq-len slots. A CPU
            verifies such a graph through its float32 twin (a float32 copy). The build stage makes the engine that runs.
        profiled: whether operators can be timed.
        cross: whether exports may be for another machine; bench is left out if the engine does not run here.
        dense_caches: whether caches count 0..K-1.
        provider: ONNX Runtime's execution provider, which the exporter is told.
        proposers: who can propose tokens that the engine verifies (`--draft`); empty if nobody can.
    """

    name: str
    title: str
    precisions: tuple[str, ...]
    sources: tuple[str, ...]
    extra: str
    cache_bytes: Mapping[str, int] = field(default_factory=dict)
    graphs: str = "onnx"
    static: bool = False
    profiled: bool = False
    cross: bool = False
    dense_caches: bool = False
    provider: str = "cpu"
    proposers: tuple[Proposer, ...] = ()

    def cache_itemsize(self, precision: str) -> int:
        """Bytes of a cache element."""
        return self.cache_bytes.get(precision, 4)


@dataclass(frozen=True)
class Availability:
    """Answer of a probe; `reason` says what was found, or what is missing and how to get it."""

    available: bool
    reason: str


@dataclass(frozen=True)
class Room:
    """The largest sequence, in tokens, and the largest batch that a runner is asked for."""

    tokens: int
    batch: int = 1

    def holds(self, other: Room) -> bool:
        """Whether the other fits."""
        return other.tokens <= self.tokens and other.batch <= self.batch

    def within(self, tokens: int) -> Room:
        """The same room with at most so many tokens."""
        return Room(min(self.tokens, tokens), self.batch)

    def joined(self, other: Room) -> Room:
        """The smallest room that holds both."""
        return Room(max(self.tokens, other.tokens), max(self.batch, other.batch))


class TextRunner(Protocol):
    """A loaded decoder that generates text, for bench and generate; a context manager."""

    def __enter__(self) -> TextRunner: ...

    def __exit__(self, *exc: object) -> None: ...

    def begin(self, max_tokens: int, batch: int = 1) -> None:
        """Forget the sequence; make room for max_tokens of the next sequence, or of each sequence of a batch.

        Raises:
            NblError: the runner takes one sequence only, and `batch` is more.
        """

    def append(self, ids: Sequence[int]) -> None:
        """Run the decoder over ids as one chunk: prefill, or one decode step for a single id. A batch takes [B, T].

        Returns when the device has finished, so that a clock can be read.
        """

    def rewind(self, length: int) -> None:
        """Drop everything after the first `length` tokens."""

    def pick(self) -> int:
        """The most likely next token of the first sequence; valid only right after `append`."""

    def encode(self, prompt: str, *, chat: bool) -> list[int]:
        """Token ids of a prompt, through the chat template if there is one and `chat` asks for it."""

    def stream(self, ids: Sequence[int], max_new_tokens: int) -> Iterator[str]:
        """Greedy continuation as text pieces, until the end of text or the limit."""

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """Greedy continuation as token ids; ignores the end of text."""


class GraphDecoder(Protocol):
    """A graph with its caches, one step at a time, for verification.

    Attributes:
        contract: inputs and outputs of the graph.
    """

    contract: GraphContract

    @property
    def slots(self) -> int:
        """Tokens that the caches have room for."""

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches of the running batch take."""

    def begin(self, batch: int) -> None:
        """Start a batch with empty caches."""

    def step(self, ids_BT: np.ndarray, valid_BT: np.ndarray | None = None) -> np.ndarray:
        """Append tokens; returns logits [B, T, V], or [B, 1, V] of the last token. valid_BT is 0 for padding."""


@dataclass(frozen=True)
class Generation:
    """A greedy continuation.

    Attributes:
        tokens: of the answer, with the end of text if it was reached.
        prefill_ns: until the prompt is read.
        decode_ns: of all tokens behind it.
        proposed, accepted: proposed tokens that the decoder examined, and those that it accepted.
        rounds: steps of the decoder that verified proposed tokens.
    """

    tokens: tuple[int, ...]
    prefill_ns: int
    decode_ns: int
    proposed: int = 0
    accepted: int = 0
    rounds: int = 0


@dataclass(frozen=True)
class Draft:
    """A draft in a folder of lossless decoding that is not settled: its name, and the engine's settings for it."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


class ProposingRunner(Protocol):
    """A loaded decoder with proposed tokens, or without them for comparison; a context manager."""

    def __enter__(self) -> ProposingRunner: ...

    def __exit__(self, *exc: object) -> None: ...

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest sequence."""

    def encode(self, prompt: str, *, chat: bool) -> list[int]:
        """Token ids of a prompt, see `TextRunner`."""

    def generation(self, ids: Sequence[int], new_tokens: int, options: Mapping[str, int | bool]) -> Generation:
        """A timed greedy continuation, up to `new_tokens` or the end of text.

        Args:
            options: of the proposer; empty for the folder's own way.
        """

    def stream(self, ids: Sequence[int], max_new_tokens: int) -> Iterator[str]:
        """Greedy continuation as text pieces, see `TextRunner`."""


@dataclass(frozen=True)
class BuildSettings:
    """What a plan is built for.

    Attributes:
        targets: compute capabilities; empty for the library's own choice.
    """

    max_batch: int = 1
    prefill_chunk: int = 512
    targets: tuple[str, ...] = ()


class Built(Protocol):
    """What a compiler reports of a plan that it has built."""

    @property
    def plan_bytes(self) -> int: ...

    @property
    def build_seconds(self) -> float: ...

    def to_json(self) -> dict[str, Any]: ...


class Compiler(Protocol):
    """Makes an engine of a graph of the static form."""

    def library_version(self) -> str:
        """Version of the installed package, without loading it; "" if there is none."""

    def build(self, source: Path, out: Path, settings: BuildSettings) -> Built:
        """Compile the graph in `source` into the directory `out`."""


class Engine(Protocol):
    """Runs a decoder graph. `compiler` is None for engines that run graphs as they are."""

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def compiler(self) -> Compiler | None: ...

    def probe(self) -> Availability:
        """Whether directories can be exported and verified here, by a known answer. Never raises."""

    def probe_run(self) -> Availability:
        """Whether exported directories run here. Never raises."""

    def default_threads(self) -> int:
        """Number of threads, at least 1."""

    def arithmetic(self, directory: Path) -> str:
        """What the engine computes in, and keeps keys and values in, in words; "" if the graph's own types say it."""

    def open_runner(self, directory: Path, threads: int | None = None, room: Room | None = None) -> TextRunner:
        """A runner on the deployed model.

        Args:
            room: what the runner will be asked for, if known; engines that are sized on opening read it.
        """

    def open_checked(self, directory: Path, threads: int | None = None) -> TextRunner:
        """A runner on the deployed model or on its float32 twin, on a CPU, for verification."""

    def open_lossless(self, directory: Path, threads: int | None = None, draft: Draft | None = None) -> ProposingRunner:
        """A runner with proposed tokens, for engines with `proposers`.

        Args:
            directory: a folder of lossless decoding, or a deployable directory for plain decoding.
            draft: of a folder that is not settled; None for the folder's own way.
        """

    def open_graph(self, directory: Path, spec: DecoderSpec, file: str | None = None) -> GraphDecoder:
        """The graph for verification: the graph with all logits, unless `file` names another."""
