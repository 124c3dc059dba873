"""What an engine is: its capabilities as data, a probe that answers by a known-answer run, and a runner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Availability", "Capabilities", "TextRunner"]


@dataclass(frozen=True)
class Capabilities:
    """What differs between engines. No `if engine ==` anywhere else.

    precisions: what `--precision` may say, sources: decoder sources whose graphs it takes; defaults first.
    extra: the optional extra that installs it. half_caches: precisions whose caches have two bytes an element.
    cross: what it exports may be for another machine; bench is left out where it does not run. dense_caches: caches
    count 0..K-1. provider: ONNX Runtime's execution provider, which the exporter is told.
    static: it compiles graphs of the static form. Such a graph has caches of --max-seq-len slots, is proven through
    its float32 twin on a CPU, and a build stage makes the engine, which is what runs.
    """

    name: str
    title: str
    precisions: tuple[str, ...]
    sources: tuple[str, ...]
    extra: str
    half_caches: tuple[str, ...] = ()
    static: bool = False
    cross: bool = False
    dense_caches: bool = False
    provider: str = "cpu"

    def cache_itemsize(self, precision: str) -> int:
        """Bytes of a cache element."""
        return 2 if precision in self.half_caches else 4


@dataclass(frozen=True)
class Availability:
    """Answer of a probe. `reason` says what is missing and how to get it, or what was found."""

    available: bool
    reason: str


class TextRunner(Protocol):
    """A loaded decoder that generates: what bench and generate need, whichever the engine. A context manager."""

    def __enter__(self) -> TextRunner: ...

    def __exit__(self, *exc: object) -> None: ...

    def begin(self, max_tokens: int, batch: int = 1) -> None:
        """Forget the sequence; make room for max_tokens of the next one, or of each of a batch.

        Raises:
            NblError: it runs one sequence only, and `batch` is more.
        """

    def append(self, ids: Sequence[int]) -> None:
        """Run the decoder over ids as one chunk (prefill, or one decode step for a single id); of a batch [B, T]."""

    def rewind(self, length: int) -> None:
        """Drop everything after the first `length` tokens."""

    def pick(self) -> int:
        """The most likely next token (of the first sequence); only valid right after `append`."""

    def encode(self, prompt: str, *, chat: bool) -> list[int]:
        """Token ids of a prompt, through the chat template if there is one and `chat` asks for it."""

    def stream(self, ids: Sequence[int], max_new_tokens: int) -> Iterator[str]:
        """Greedy continuation as text pieces, until the end of text or the limit."""

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """Greedy continuation as token ids, end of text ignored."""
