"""Runs the static form on any session that holds its caches: batches for verification, one sequence for text.

    Session  (ONNX Runtime or TensorRT: one step of the graph)
       ├─ StaticDecoder   begin ─ step ─ step ...          for verification: logits of a batch
       └─ StaticRunner    begin ─ append ─ rewind ...      for bench, generate and check text (a TextRunner)

Prompts longer than the session's chunk run in several steps (`schedule`). More tokens than cache slots are refused
before anything runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from nbl_export.errors import NblError
from nbl_export.records.decoder import GraphContract
from nbl_export.targets.tensorrt.static.schedule import Rows, Step
from nbl_export.targets.tokenizer import Speaking

__all__ = ["Session", "StaticDecoder", "StaticRunner"]

log = logging.getLogger(__name__)


class Session(Protocol):
    """A loaded graph of the static form and the caches of a batch.

    Attributes:
        slots: slots of a cache.
        chunk: most tokens of a step.
        cache_bytes: bytes that the caches of the running batch take.
    """

    contract: GraphContract
    cache_length: int
    chunk: int

    @property
    def cache_bytes(self) -> int: ...

    def begin(self, batch: int) -> None:
        """Zero the caches for a batch."""

    def fill(self, value: float) -> None:
        """Put a value into every slot of the caches, to test that only written slots count."""

    def run(self, ids_BT: np.ndarray, writes: Sequence[int], counts: Sequence[int]) -> np.ndarray:
        """Run one step; returns float32 logits [B, T, V], or [B, 1, V] of each row's last token."""

    def close(self) -> None:
        """Free all memory."""


class StaticDecoder:
    """Runs batches of rows of different lengths, with the interface of `graph.decoder.OnnxDecoder`."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.contract = session.contract
        self._rows = Rows(0, session.cache_length, session.chunk)
        self._last_only = any(info.name == "num_tokens" for info in session.contract.inputs)

    def begin(self, batch: int) -> None:
        """Start a batch with empty caches."""
        self.session.begin(batch)
        self._rows = Rows(batch, self.session.cache_length, self.session.chunk)

    def step(self, ids_BT: np.ndarray, valid_BT: np.ndarray | None = None) -> np.ndarray:
        """Append tokens; returns float32 logits [B, T, V], or [B, 1, V] of each row's last new token (pruned graph).

        Args:
            ids_BT: token ids.
            valid_BT: 1 for tokens, 0 for padding on the right; any chunk may be padded.

        Raises:
            NblError: a row would outgrow its cache; nothing has run.
        """
        counts = [ids_BT.shape[1]] * len(ids_BT) if valid_BT is None else _counts(valid_BT)
        logits: np.ndarray | None = None
        for step in self._rows.plan(counts):
            found = self.session.run(_columns(ids_BT, step), step.writes, step.counts)
            self._rows.advance(step)
            if logits is None:
                shape = (len(ids_BT), 1 if self._last_only else ids_BT.shape[1], found.shape[-1])
                logits = np.zeros(shape, np.float32)
            self._place(logits, found, step)
        if logits is None:
            raise NblError("there are no tokens to append")
        return logits

    def _place(self, logits: np.ndarray, found: np.ndarray, step: Step) -> None:
        if not self._last_only:
            logits[:, step.start : step.start + step.width] = found
            return
        for row, count in enumerate(step.counts):
            if count:
                logits[row] = found[row]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each row holds."""
        return tuple(self._rows.lengths)

    @property
    def cache_length(self) -> int:
        """Tokens that a row can hold; its cache is allocated for all of them."""
        return self.session.cache_length

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches of the running batch take, filled or not."""
        return self.session.cache_bytes

    def rewind(self, length: int) -> None:
        """Drop everything after the first `length` tokens of the only row."""
        self._rows.rewind(length)


def _counts(valid_BT: np.ndarray) -> list[int]:
    counts = valid_BT.sum(1).astype(int)
    if not np.array_equal(valid_BT.astype(bool), np.arange(valid_BT.shape[1])[None] < counts[:, None]):
        raise ValueError("padding must be on the right")
    return [int(n) for n in counts]


def _columns(ids_BT: np.ndarray, step: Step) -> np.ndarray:
    """The step's token ids; padding is 0."""
    part = ids_BT[:, step.start : step.start + step.width].astype(np.int64)
    part = np.where(np.arange(step.width)[None] < np.array(step.counts)[:, None], part, 0)
    return np.ascontiguousarray(part)


class StaticRunner(Speaking):
    """One sequence on a directory of the static form: the TextRunner of the engines that take this form.

    Args:
        session: a loaded graph with last-token logits.
        directory: holds the tokenizer; named in messages.
    """

    advice = ", or export with a larger --max-seq-len"

    def __init__(self, session: Session, directory: Path) -> None:
        self.directory = directory
        self._session = session
        self._decoder = StaticDecoder(session)
        self.context_length = self._decoder.cache_length
        self._capacity = 0
        self._logits = np.zeros(0, np.float32)

    def __enter__(self) -> StaticRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        """Free the caches and the model; the runner cannot be used afterwards.

        If the block failed, its error goes on, and a failure to close is a warning.
        """
        try:
            self._session.close()
        except Exception as error:
            if not exc or exc[0] is None:
                raise
            log.warning("%s does not close after an error: %s", self.directory, error)

    def begin(self, max_tokens: int, batch: int = 1) -> None:
        """Forget the sequence; the cache always has its full length, however few tokens are asked for.

        Raises:
            NblError: `batch` is more than one.
        """
        if batch != 1:
            raise NblError(f"{self.directory} is run on one sequence at a time here, not on {batch}; use --batch 1")
        self._capacity = min(max_tokens, self._decoder.cache_length)
        self._decoder.begin(1)

    def append(self, ids: Sequence[int]) -> None:
        """Run the decoder over ids, in as few steps as the chunk allows; returns after the computation.

        Raises:
            NblError: the sequence would outgrow what `begin` reserved.
        """
        length = self._decoder.lengths[0] + len(ids)
        if length > self._capacity:
            raise NblError(
                f"{length} tokens do not fit into {self.directory}: room for {self._capacity} (its caches have "
                f"{self._decoder.cache_length} slots); use a shorter prompt, or export with a larger --max-seq-len"
            )
        self._logits = self._decoder.step(np.asarray(ids, np.int64)[None])[0, -1]

    def rewind(self, length: int) -> None:
        """Drop everything after the first `length` tokens; costs nothing, because the cache stays."""
        self._decoder.rewind(length)

    def fill(self, value: float) -> None:
        """Put a value into every slot of the caches, right after `begin`."""
        self._session.fill(value)

    def last_logits(self) -> np.ndarray:
        """Logits [V] float32 after the last token; valid only right after `append`."""
        return self._logits

    def pick(self) -> int:
        """The most likely next token.

        Raises:
            NblError: the logits are not finite.
        """
        token = int(self._logits.argmax())  # of the first NaN, if there is one
        if not np.isfinite(self._logits[token]):
            raise NblError(
                f"{self.directory} gives logits that are not finite: its numbers overflow; export it with --precision "
                "bf16 instead of fp16 or int4"
            )
        return token
