"""Runs the static form on any session that holds its caches: batches for verification, one sequence for text.

    Session  (ONNX Runtime or TensorRT: one step of the graph)
       ├─ StaticDecoder   begin ─ step ─ step ...          for verification: logits of a batch
       └─ StaticRunner    begin ─ append ─ rewind ...      for bench, generate and check text (a TextRunner)

Prompts longer than the session's chunk run in several steps (`schedule`). More tokens than cache slots are refused
before anything runs.

Plans the steps of a static-form runner: rows, chunks, slots and profiles. Pure; loads no engine.

    row 0   [######....|                ]    length 6, new tokens ....      a step writes T slots into every row,
    row 1   [##........|                ]    at the row's own length; the first counts[b] of these are tokens

Rules that the graph needs and cannot check:
- Caches start zeroed: masked slots are multiplied by 0, and 0 x NaN is NaN.
- T of a step is at most the free slots of every row that is not full, resting rows included. The reason is
  write_indices[b] + T <= S (TensorRT's KVCacheUpdate: what lies beyond is undefined).
- A resting row has count 0, and padding is written behind its length. The next step overwrites this padding before any
  token reads it. A full row's padding overwrites its own last slots, after which nothing can follow.

Two optimisation profiles: prefill of 1..chunk tokens, decode of one. Measured with TensorRT-RTX 1.7.1:
- In a profile, a product without any dynamic dimension has its own copy of its matrix (SmolLM2 fp16, all of decode:
  499 MB instead of 288). So decode always allows at least two rows.
- Prefill allows two rows if products are on one token of each row behind a pruned tail (8 layers replaced: 276 MB
  instead of 316), and with int4 matrices (154 MB instead of 192). This costs the scratch memory of the second row.
- Attention of exactly one token has no kernel from 24576 slots on (24064 still builds; heads of 16 to 256, compute
  capability 7.5 to 12.0), while 1..2 tokens build at 65536; hence `_STATIC_DECODE_SLOTS`, with a margin.

A step of two tokens runs in prefill even so: decode keeps one shape, for which its step is captured as a CUDA graph.
A graph does not survive a change of shape (NVIDIA/TensorRT#3798).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from nbl_export.errors import NblError
from nbl_export.records.decoder import GraphContract
from nbl_export.targets.tokenizer import Speaking

__all__ = [
    "Profile",
    "Rows",
    "Session",
    "StaticDecoder",
    "StaticRunner",
    "Step",
    "engine_profiles",
    "plan_steps",
    "profile_for",
]

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


Triple = tuple[int, int, int]
_STATIC_DECODE_SLOTS = 16_384


@dataclass(frozen=True)
class Profile:
    """Ranges (minimum, optimum, maximum) of rows and of tokens in a step."""

    name: str
    batch: Triple
    tokens: Triple

    def takes(self, batch: int, tokens: int) -> bool:
        """Whether the profile allows a step of so many rows and tokens."""
        return all(low <= n <= high for n, (low, _, high) in ((batch, self.batch), (tokens, self.tokens)))

    @property
    def decodes(self) -> bool:
        """Whether the profile is for steps of one token, whatever range it was built with."""
        return self.tokens[1] == 1


def engine_profiles(
    max_batch: int, chunk: int, cache_length: int, *, two_rows: bool = False
) -> tuple[Profile, Profile]:
    """The prefill and the decode profile of an engine, in this order.

    Args:
        two_rows: whether prefill allows a second row, for int4 matrices or last-token logits.

    Raises:
        NblError: there are no rows, or the cache cannot hold the chunk.
    """
    if max_batch < 1:
        raise NblError(f"--max-batch {max_batch} is not possible: at least one row")
    if not 1 <= chunk <= cache_length:
        raise NblError(f"--prefill-chunk {chunk} is not possible: use 1 to --max-seq-len, {cache_length}")
    widest = max(2, chunk)
    decode_tokens = (1, 1, 1) if cache_length <= _STATIC_DECODE_SLOTS else (1, 1, 2)
    rows, shared = (1, max_batch, max_batch), (1, max_batch, max(2, max_batch))
    prefill = Profile("prefill", shared if two_rows else rows, (1, widest, widest))
    return prefill, Profile("decode", shared, decode_tokens)


def profile_for(profiles: Sequence[Profile], batch: int, tokens: int) -> int:
    """Index of the narrowest profile that allows the step; more than one token never runs in decode.

    Raises:
        NblError: no profile allows the step.
    """
    fitting = [
        (profile.tokens[2], index)
        for index, profile in enumerate(profiles)
        if profile.takes(batch, tokens) and (tokens == 1 or not profile.decodes)
    ]
    if not fitting:
        limits = " or ".join(f"{p.batch[2]} rows of {p.tokens[2]} tokens" for p in profiles)
        raise NblError(
            f"the engine was not built for {batch} rows of {tokens} tokens at once, it takes up to {limits}; build it "
            "again with another --max-batch or --prefill-chunk"
        )
    return min(fitting)[1]


@dataclass(frozen=True)
class Step:
    """One run of the graph: columns start..start+width of the right-padded new tokens.

    Attributes:
        writes: slot of each row's first token (the graph's write_indices).
        counts: tokens of each row that are not padding (the graph's num_tokens).
    """

    start: int
    width: int
    writes: tuple[int, ...]
    counts: tuple[int, ...]


def plan_steps(lengths: Sequence[int], counts: Sequence[int], cache_length: int, chunk: int) -> tuple[Step, ...]:
    """The steps that append counts[b] tokens to row b, which holds lengths[b] of `cache_length`.

    Raises:
        NblError: a row would outgrow its cache; nothing has run.
    """
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        if length + count > cache_length:
            raise NblError(
                f"row {row}: {length} tokens are cached and {count} more do not fit into {cache_length} slots; use a "
                "shorter prompt, or export with a larger --max-seq-len"
            )
    steps: list[Step] = []
    now, done, total = list(lengths), 0, max(counts, default=0)
    while done < total:
        room = min(cache_length - n for n in now if n < cache_length)
        width = min(chunk, room, total - done)
        taken = tuple(max(0, min(width, count - done)) for count in counts)
        steps.append(Step(done, width, tuple(min(n, cache_length - width) for n in now), taken))
        now = [n + t for n, t in zip(now, taken, strict=True)]
        done += width
    return tuple(steps)


class Rows:
    """The length of each row of a batch."""

    def __init__(self, batch: int, cache_length: int, chunk: int) -> None:
        self.cache_length, self.chunk = cache_length, chunk
        self.lengths = [0] * batch

    def plan(self, counts: Sequence[int]) -> tuple[Step, ...]:
        """See `plan_steps`; changes nothing."""
        return plan_steps(self.lengths, counts, self.cache_length, self.chunk)

    def advance(self, step: Step) -> None:
        """Record that the step has run."""
        self.lengths = [n + count for n, count in zip(self.lengths, step.counts, strict=True)]

    def rewind(self, length: int) -> None:
        """Drop everything after the first `length` tokens of a single row.

        Several rows cannot be rewound: padding may have overwritten the end of a full row (see above).
        """
        if len(self.lengths) != 1 or not 0 <= length <= self.lengths[0]:
            raise ValueError(f"cannot rewind rows of {self.lengths} tokens to {length}")
        self.lengths = [length]
