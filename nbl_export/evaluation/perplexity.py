"""Perplexity of a text with an explicit context and stride.

    tokens    0 1 2 3 4 5 6 7 8 9 ...          context 6, stride 4
    window 0  . p p p p p                      . is read, p is read and scored
    window 1          . . p p p p              a token is scored once, after at least context - stride tokens
                                               (the first token of a window is never scored: it has no context)

If the stride equals the context, windows do not overlap, as in the perplexity of `verify`. Documents are tokenised one
by one and joined, as for calibration. Tokens that do not fill the last window are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nbl_export.errors import NblError, UsageError
from nbl_export.text.corpus import READ_BYTES, Text

__all__ = ["NamedText", "parse_named", "windows"]


@dataclass(frozen=True)
class NamedText:
    """A text for perplexity, and the user's name for the text."""

    name: str
    text: Text


def parse_named(words: str) -> list[tuple[str, str]]:
    """The pairs (name, file) of NAME=FILE,NAME=FILE.

    Raises:
        UsageError: a word does not have this form, or two texts have the same name.
    """
    pairs = []
    for word in words.split(","):
        name, sign, file = word.partition("=")
        if not (sign and name.strip() and file.strip()):
            raise UsageError(f"--perplexity: write NAME=FILE, comma separated, not {word!r}")
        pairs.append((name.strip(), file.strip()))
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise UsageError("--perplexity: two texts have the same name; give each text its own name")
    return pairs


def windows(
    named: NamedText, tokenizer: Any, context: int, stride: int, limit: int | None
) -> list[tuple[list[int], list[int]]]:
    """Token ids (context, scored) of each window; at most `limit` windows.

    Raises:
        NblError: the text is shorter than one window, or the windows need more of the text than was read.
    """
    ids: list[int] = []
    enough = None if limit is None else context + (limit - 1) * stride
    for document in named.text.documents:
        ids.extend(tokenizer(document, verbose=False)["input_ids"])
        if enough is not None and len(ids) >= enough:
            break
    if named.text.cut and (enough is None or len(ids) < enough):
        raise NblError(f"of the text {named.name} only the first {READ_BYTES >> 20} MiB are read; give --limit")
    starts = range(0, len(ids) - context + 1, stride)[:limit]
    if not starts:
        raise NblError(
            f"the text {named.name} has {len(ids)} tokens, fewer than one window of {context}; "
            "give more text or a smaller --ppl-context"
        )
    return [_cut(ids[start : start + context], 1 if start == 0 else max(1, context - stride)) for start in starts]


def _cut(window: Sequence[int], read: int) -> tuple[list[int], list[int]]:
    return list(window[:read]), list(window[read:])
