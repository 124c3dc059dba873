"""Greedy continuation of a prompt, the same on every runner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from nbl_export.errors import NblError
from nbl_export.targets.runners import TextRunner

__all__ = ["continued"]


def continued(
    runner: TextRunner, directory: Path, ids: Sequence[int], new_tokens: int, limit: int, advice: str = ""
) -> Iterator[int]:
    """Token ids behind a prompt, until `new_tokens` or until prompt and answer have `limit` tokens.

    Args:
        advice: what a user can do about the limit, beside a shorter prompt.

    Raises:
        NblError: the prompt is empty, or leaves no room for an answer.
    """
    if not len(ids):
        raise NblError("the prompt is empty: give at least one word")
    if len(ids) >= limit:
        raise NblError(
            f"the prompt has {len(ids)} tokens and {directory} takes {limit}, the answer included: "
            f"shorten the prompt{advice}"
        )
    runner.begin(len(ids) + new_tokens)
    chunk: Sequence[int] = ids
    for _ in range(min(new_tokens, limit - len(ids))):
        runner.append(chunk)
        chunk = [runner.pick()]
        yield chunk[0]
