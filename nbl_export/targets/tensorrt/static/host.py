"""Text on caches of fixed length.

    TrtSession  (one step of an engine) ── StaticRunner    begin ─ append ─ rewind ...    for bench, generate and accept
    OnnxDecoder (float32, on a CPU)     ── CheckedRunner   begin ─ append ...             for verification

Prompts longer than the session's chunk run in several steps. More tokens than cache slots are refused before anything
runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import NblError
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.targets.tensorrt.runner import TrtSession
from nbl_export.targets.tokenizer import TextGenerationMixin

__all__ = ["CheckedRunner", "StaticRunner", "likeliest", "widened"]

log = logging.getLogger(__name__)


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


class StaticRunner(TextGenerationMixin):
    """Text on a directory of the static form: the TextRunner of the engines that take this form.

    Args:
        session: a loaded engine.
        directory: holds the tokenizer; named in messages.
    """

    advice = ", or export with a larger --max-seq-len"

    def __init__(self, session: TrtSession, directory: Path) -> None:
        self.directory = directory
        self._session = session
        self.context_length = session.cache_length
        self._length = self._capacity = 0
        self._raw_V = np.zeros(0, np.float32)

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

    def begin(self, max_tokens: int) -> None:
        """Forget the sequence; the cache always has its full length, however few tokens are asked for."""
        self._length = 0
        self._capacity = min(max_tokens, self.context_length)
        self._session.begin(1)

    def append(self, ids: Sequence[int]) -> None:
        """Run the decoder over ids, in as few steps as the chunk allows; returns after the computation.

        Raises:
            NblError: the sequence would outgrow what `begin` reserved.
        """
        ids_BT = np.asarray(ids, np.int64)[None]
        tokens = ids_BT.shape[1]
        chunk = self._session.chunk
        self.check_room(self._length + tokens, self._capacity)
        for begin in range(0, tokens, chunk):
            part_BT = ids_BT[:, begin : begin + chunk]
            count = part_BT.shape[1]
            if padding := self._width(count) - count:
                part_BT = np.pad(part_BT, ((0, 0), (0, padding)))
            self._raw_V = self._session.run(part_BT, self._length, count)[0, -1]
            self._length += count

    def _width(self, count: int) -> int:
        """Tokens of a step, padding included, of which `count` are not padding; the padding fits into the cache."""
        most = min(self._session.chunk, self.context_length - self._length)
        return next((w for w in self._session.widths if 1 < count <= w <= most), count)

    def rewind(self, length: int) -> None:
        """Drop everything after the first `length` tokens; costs nothing, because the cache stays."""
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot rewind {self._length} tokens to {length}")
        self._length = length

    def last_logits(self) -> np.ndarray:
        return widened(self._raw_V)

    def pick(self) -> int:
        """The most likely next token.

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


class CheckedRunner(TextGenerationMixin):
    """Text on a graph of the static form on a CPU.

    Args:
        directory: holds the tokenizer; named in messages.
    """

    def __init__(self, decoder: OnnxDecoder, directory: Path) -> None:
        self.directory = directory
        self._decoder = decoder
        self.context_length = decoder.cache_length
        self._logits_V = np.zeros(0, np.float32)

    def begin(self, max_tokens: int) -> None:
        """Forget the sequence."""
        self._decoder.begin(1)

    def append(self, ids: Sequence[int]) -> None:
        """Run the decoder over ids."""
        self._logits_V = self._decoder.step(np.asarray(ids, np.int64)[None])[0, -1]

    def rewind(self, length: int) -> None:
        """Drop everything after the first `length` tokens; the cache keeps what it holds."""
        caches, mask_BT = self._decoder.mark()
        self._decoder.rewind((caches, mask_BT[:, :length]))

    def last_logits(self) -> np.ndarray:
        return self._logits_V
