"""Optimisation profiles: prefill of 1..chunk tokens, decode of one, and decode of a batch if it may exceed two rows.

A profile's kernels are chosen for its optimum, so that one row in an engine for many does not take the kernels of many.
Measured with TensorRT-RTX 1.7.1:
- In a profile, a product without any dynamic dimension has its own copy of its matrix (SmolLM2 fp16, all of decode:
  499 MB instead of 288). So decode always allows at least two rows.
- Prefill allows two rows if products are on one token of each row behind a pruned tail (8 layers replaced: 276 MB
  instead of 316), and with int4 matrices (154 MB instead of 192). This costs the scratch memory of the second row.
- Attention of exactly one token has no kernel from 24576 slots on (24064 still builds; heads of 16 to 256, compute
  capability 7.5 to 12.0), while 1..2 tokens build at 65536; hence `_STATIC_DECODE_SLOTS`.
- Attention of several tokens copies keys and values of all slots for each query head, a row each: 537 MB at 32768 slots
  with 32 heads of 128. So an engine for one row that decodes 1..2 tokens has one row in both profiles. Its products
  have a dynamic dimension, or are without one in both profiles, so no matrix is stored twice.

A step of two tokens runs in prefill even so: decode keeps one shape, for which its step is captured as a CUDA graph.
A graph does not survive a change of shape (NVIDIA/TensorRT#3798).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from nbl_export.errors import NblError

__all__ = ["Profile", "engine_profiles", "in_two_tokens", "profile_for"]

Triple = tuple[int, int, int]
_STATIC_DECODE_SLOTS = 24_064


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


def engine_profiles(max_batch: int, chunk: int, cache_length: int, *, two_rows: bool = False) -> tuple[Profile, ...]:
    """The prefill profile of an engine and one or two decode profiles, in this order.

    Args:
        two_rows: whether prefill allows a second row, for int4 matrices or last-token logits.

    Raises:
        NblError: there are no rows, or the cache cannot hold the chunk.
    """
    if max_batch < 1:
        raise NblError(f"key max_batch {max_batch} is not possible: at least one row")
    if not 1 <= chunk <= cache_length:
        raise NblError(f"key prefill_chunk {chunk} is not possible: use 1 to --max-seq-len, {cache_length}")
    widest = max(2, chunk)
    token = (1, 1, 1)
    rows = (1, max_batch, max_batch)
    shared = (1, max_batch, max(2, max_batch))
    found = [Profile("prefill", shared if two_rows else rows, (1, widest, widest)), Profile("decode", shared, token)]
    if max_batch > 2:
        found[1:] = Profile("decode", (1, 1, 2), token), Profile("decode_batch", shared, token)
    return tuple(found) if cache_length <= _STATIC_DECODE_SLOTS else in_two_tokens(found)


def in_two_tokens(profiles: Sequence[Profile]) -> tuple[Profile, ...]:
    """The profiles with decode of 1 to 2 tokens; of an engine for one row, all take one row alone."""
    single = all(p.batch[1] == 1 for p in profiles)
    return tuple(
        dataclasses.replace(p, batch=(1, 1, 1) if single else p.batch, tokens=(1, 1, 2) if p.decodes else p.tokens)
        for p in profiles
    )


def profile_for(profiles: Sequence[Profile], batch: int, tokens: int) -> int:
    """Index of the narrowest profile that allows the step, the first of several; more than one token never decodes.

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
            "again with another key max_batch or key prefill_chunk"
        )
    return min(fitting)[1]
