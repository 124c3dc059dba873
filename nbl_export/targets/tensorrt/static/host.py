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
from typing import Any, Protocol

import numpy as np

from nbl_export.errors import NblError
from nbl_export.records.decoder import GraphContract
from nbl_export.targets.tensorrt.static.schedule import Rows, Step
from nbl_export.targets.tokenizer import Speaking

__all__ = ["Session", "StaticDecoder", "StaticRunner", "likeliest", "widened"]

log = logging.getLogger(__name__)


class Session(Protocol):
    """A loaded graph of the static form and the caches of a batch.

    Attributes:
        cache_length: slots of a cache.
        chunk: most tokens of a step.
        widths: ascending widths that a step of several tokens is padded to; empty for none.
        cache_bytes: bytes that the caches of the running batch take.
    """

    contract: GraphContract
    cache_length: int
    chunk: int
    widths: tuple[int, ...]

    @property
    def cache_bytes(self) -> int: ...

    def begin(self, batch: int) -> None:
        """Zero the caches for a batch."""

    def run(self, ids_BT: np.ndarray, writes: Sequence[int], counts: Sequence[int]) -> np.ndarray:
        """Run one step; returns logits [B, T, V], or [B, 1, V] of each row's last token, as the engine gives them.

        The array is valid until the next step. See `widened`.
        """

    def close(self) -> None:
        """Free all memory."""


def widened(raw: np.ndarray) -> np.ndarray:
    """A float32 copy of logits in float32, in float16, or in bfloat16, whose bits are in uint16."""
    if raw.dtype == np.uint16:
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


# Type of the logits -> integers of its width, with and without a sign, and the bits of infinity.
_BITS: dict[np.dtype, tuple[Any, Any, int]] = {
    np.dtype(np.float16): (np.int16, np.uint16, 0x7C00),
    np.dtype(np.uint16): (np.int16, np.uint16, 0x7F80),
    np.dtype(np.float32): (np.int32, np.uint32, 0x7F800000),
}


def likeliest(raw_V: np.ndarray) -> int:
    """Index of the largest logit, read from the bits; -1 if it is infinite, or if any logit is not a number.

    Bits of positive numbers are ordered as integers with a sign. Bits of negative numbers are integers below 0, in
    reverse order. Bits of what is not a number lie beyond those of infinity. NumPy compares integers much faster than
    float16.
    """
    signed, unsigned, infinite = _BITS[raw_V.dtype]
    bits = raw_V.view(signed)
    token = int(bits.argmax())
    if bits[token] >= infinite or raw_V.view(unsigned).max() > infinite + np.iinfo(signed).max + 1:
        return -1
    return token if bits[token] >= 0 else int(bits.argmin())


class StaticDecoder:
    """Runs batches of rows of different lengths, with the interface of `graph.decoder.OnnxDecoder`."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.contract = session.contract
        self._rows = Rows(0, session.cache_length, session.chunk, session.widths)
        self._last_only = session.contract.logits == "last"

    def begin(self, batch: int) -> None:
        """Start a batch with empty caches."""
        self.session.begin(batch)
        self._rows = Rows(batch, self.session.cache_length, self.session.chunk, self.session.widths)

    def step(self, ids_BT: np.ndarray, valid_BT: np.ndarray | None = None) -> np.ndarray:
        """Append tokens; returns float32 logits [B, T, V], or [B, 1, V] of each row's last new token (pruned graph).

        Logits of tokens that a graph with a cut does not compute are NaN.

        Args:
            ids_BT: token ids.
            valid_BT: 1 for tokens, 0 for padding on the right; any chunk may be padded.

        Raises:
            NblError: a row would outgrow its cache; nothing has run.
        """
        counts = [ids_BT.shape[1]] * len(ids_BT) if valid_BT is None else _counts(valid_BT)
        logits: np.ndarray | None = None
        for step in self._rows.plan(counts):
            found = widened(self.session.run(_columns(ids_BT, step), step.writes, step.counts))
            self._rows.advance(step)
            if logits is None:
                shape = (len(ids_BT), 1 if self._last_only else ids_BT.shape[1], found.shape[-1])
                logits = np.zeros(shape, np.float32)
            self._place(logits, found, step)
        if logits is None:
            raise NblError("there are no tokens to append")
        return logits

    def _place(self, logits: np.ndarray, found: np.ndarray, step: Step) -> None:
        given = found.shape[1]
        if not self._last_only and given == step.width:
            logits[:, step.start : step.start + step.width] = found
            return
        for row, count in enumerate(step.counts):
            if self._last_only and count:
                logits[row] = found[row]
            elif not self._last_only:  # of the first token and of the last ones, see `rewrite.cut_static`
                near = step.start + 1 + max(0, count - given)
                logits[row, step.start : step.start + step.width] = np.nan
                logits[row, step.start] = found[row, 0]
                logits[row, near : near + given - 1] = found[row, 1:]

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

    def mark(self) -> int:
        """The length of the only row, for `rewind`."""
        return self.lengths[0]

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
    if min(step.counts) == step.width:
        return part
    padded = np.zeros((len(part), step.width), np.int64)
    padded[:, : part.shape[1]] = part
    padded[np.arange(step.width)[None] >= np.array(step.counts)[:, None]] = 0
    return padded


class StaticRunner(Speaking):
    """Text on a directory of the static form: the TextRunner of the engines that take this form.

    Sequences of a batch have equal lengths, so no step is padded, and the batch can be rewound.

    Args:
        session: a loaded graph with last-token logits.
        directory: holds the tokenizer; named in messages.
    """

    advice = ", or export with a larger --max-seq-len"

    def __init__(self, session: Session, directory: Path) -> None:
        self.directory = directory
        self._session = session
        self._rows = Rows(1, session.cache_length, session.chunk, session.widths)
        self.context_length = session.cache_length
        self._capacity = 0
        self._raw_V = np.zeros(0, np.float32)

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
        """Forget the sequences; the cache always has its full length, however few tokens are asked for.

        Raises:
            NblError: the engine was not built for so many sequences.
        """
        self._capacity = min(max_tokens, self.context_length)
        self._session.begin(batch)
        self._rows = Rows(batch, self.context_length, self._session.chunk, self._session.widths)

    def append(self, ids: Sequence[int]) -> None:
        """Run the decoder over ids, in as few steps as the chunk allows; returns after the computation.

        Args:
            ids: [T], or [B, T] of a batch.

        Raises:
            NblError: a sequence would outgrow what `begin` reserved.
        """
        ids_BT = np.asarray(ids, np.int64)
        ids_BT = ids_BT[None] if ids_BT.ndim == 1 else ids_BT
        batch, tokens = ids_BT.shape
        self.check_room(self._rows.lengths[0] + tokens, self._capacity)
        for step in self._rows.plan((tokens,) * batch):
            self._raw_V = self._session.run(_columns(ids_BT, step), step.writes, step.counts)[0, -1]
            self._rows.advance(step)

    def rewind(self, length: int) -> None:
        """Drop everything after the first `length` tokens; costs nothing, because the cache stays."""
        self._rows.rewind(length)

    def last_logits(self) -> np.ndarray:
        """Logits [V] float32 after the last token of the first sequence; valid only right after `append`."""
        return widened(self._raw_V)

    def pick(self) -> int:
        """The most likely next token of the first sequence.

        Raises:
            NblError: the logits are not finite.
        """
        token = likeliest(self._raw_V)
        if token < 0:
            raise NblError(
                f"{self.directory} gives logits that are not finite: its numbers overflow; export it with --precision "
                "bf16 instead of fp16 or int4"
            )
        return token
