"""What targets open: decoders that generate text, give logits, or have their operators timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from nbl_export.records.decoder import GraphContract

__all__ = ["GraphDecoder", "StepDecoder", "TextRunner"]


class TextRunner(Protocol):
    """A loaded decoder that generates text, for bench and generate; a context manager."""

    def __enter__(self) -> TextRunner: ...

    def __exit__(self, *exc: object) -> None: ...

    def begin(self, max_tokens: int) -> None:
        """Forget the sequence; make room for max_tokens of the next one."""

    def append(self, ids: Sequence[int]) -> None:
        """Run the decoder over ids as one chunk: prefill, or one decode step for a single id.

        Returns when the device has finished, so that a clock can be read.
        """

    def rewind(self, length: int) -> None:
        """Drop everything after the first `length` tokens."""

    def pick(self) -> int:
        """The most likely next token; valid only right after `append`."""

    def encode(self, prompt: str, *, chat: bool) -> list[int]:
        """Token ids of a prompt, through the chat template if there is one and `chat` asks for it."""

    def stream(self, ids: Sequence[int], max_new_tokens: int) -> Iterator[str]:
        """Greedy continuation as text pieces, until the end of text or the limit."""

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """Greedy continuation as token ids; ignores the end of text."""


class StepDecoder(Protocol):
    """A decoder with its caches, one step at a time, for verification."""

    def begin(self, batch: int) -> None:
        """Start a batch with empty caches."""

    def step(self, ids_BT: np.ndarray, valid_BT: np.ndarray | None = None) -> np.ndarray:
        """Append tokens; returns logits [B, T, V], or [B, 1, V] of the last token. valid_BT is 0 for padding."""


class GraphDecoder(StepDecoder, Protocol):
    """A graph, whose inputs, outputs and caches are checked too."""

    @property
    def contract(self) -> GraphContract:
        """Inputs and outputs of the graph."""

    @property
    def cache_length(self) -> int:
        """Tokens that the caches have room for."""

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches of the running batch take."""
