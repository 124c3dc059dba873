"""Splits text into token windows of one length, and divides them by purpose.

Each window has one purpose, so no final figure is measured on text that chose something.

    calibration text  | fitted on | validation | selection | validation | test x 2 | validation x 2 | test x 6 | trained
    second text       | unused | validation | selection x 2 | test | validation | test x 3

second      text that nobody calibrates on
selection   chooses layers (`select` efficient), also as passages that occur twice, and judges distilled maps
validation  decides how many layers a goal takes
test        gives the figures of `verify`, the report and the card; no choice uses this part. The last parts are for
            further looks (`records.sequential`), which read up to four times as much as the first one
unused      was read while the tool's defaults were chosen; the second text's test part was not

A part is a run of windows: 4,096 tokens of the calibration text, or 8,192 of the second text, rounded up to windows. Of
a short calibration text an eighth is held back, and at least three windows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nbl_export.errors import NblError
from nbl_export.records.sequential import LOOKS
from nbl_export.text.corpus import Corpus

if TYPE_CHECKING:
    import torch

__all__ = [
    "CALIBRATION_ROLES",
    "DIVISION",
    "FEWEST_WINDOWS",
    "LONG_ROW",
    "PART_TOKENS",
    "SECOND_ROLES",
    "TWICE",
    "divide",
    "early_stopping_tokens",
    "extend",
    "joined",
    "pack",
    "pack_ids",
    "part_tokens",
    "repeated",
    "role_tokens",
    "selection_texts",
    "token_ids",
]

log = logging.getLogger(__name__)

# A call of a tokenizer takes some 500 bytes of memory for each character, and reads all that it is given.
_PIECE_CHARS = 1 << 16


CALIBRATION_ROLES = ("validation", "selection", "validation", "test", "test", "validation", "validation")
SECOND_ROLES = ("unused", "validation", "selection", "selection", "test", "validation")
PART_TOKENS: dict[tuple[str, ...], int] = {CALIBRATION_ROLES: 4096, SECOND_ROLES: 8192}
_JUDGING_TOKENS = 2048
LONG_ROW = 1024  # tokens of a row whose later tokens mostly read long-range tokens
_REPEATED = 2048  # tokens: some layers are needed only for long-range tokens
_PASSAGE = 64
TWICE = "held-back passages, each twice"
FEWEST_WINDOWS = 3  # one for each purpose
DIVISION: list[Any] = [*map(list, PART_TOKENS.items()), LOOKS]  # in the key of a stage that reads a part


def pack(
    text: Corpus, tokenizer: Any, tokens: int, context: int, held_out: int = 0, vocab_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenize and split into full windows: `token_ids` and `pack_ids`."""
    needed = (max(1, -(-tokens // context)) + -(-held_out // context)) * context
    return pack_ids(text, token_ids(text, tokenizer, needed, vocab_size), tokens, context, held_out)


def pack_ids(
    text: Corpus, ids: Sequence[int], tokens: int, context: int, held_out: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split the token ids of a text into full windows, packed and never padded.

    Returns:
        ids [windows, context] for calibration, and held-back ids [held, context] that follow. If the text is too short
        for all, the rest after calibration is held back: at least an eighth of the windows, and at least
        `FEWEST_WINDOWS`, if any are requested.

    Raises:
        NblError: the text is too short for one window of each.
    """
    import torch

    wanted = max(1, -(-tokens // context))
    spare = -(-held_out // context)
    windows = min(len(ids) // context, wanted + spare)
    held = min(spare, max(FEWEST_WINDOWS, windows // 8, windows - wanted))
    if windows - held < 1:
        raise NblError(
            f"calibration text {text.name} is too short: {len(ids)} tokens, "
            f"{(1 + held) * context} are needed for a context of {context}; give more text or a smaller key context"
        )
    rows = torch.tensor(ids[: windows * context], dtype=torch.long).view(windows, context)
    used = min(wanted, windows - held)
    parts = (used, wanted, "tokens to calibrate on"), (held, spare, "held-back tokens")
    short = [f"{have * context:,} of {asked * context:,} {name}" for have, asked, name in parts if have < asked]
    if short:
        ended = f", since {text.ended_by} ends there" if text.ended_by else ""
        ended += ", and only the first part of a long text is read" if text.truncated else ""
        log.warning("calibration text %s is shorter than asked: it gives %s%s", text.name, " and ".join(short), ended)
    return rows[:used], rows[windows - held :]


def token_ids(text: Corpus, tokenizer: Any, needed: int, vocab_size: int | None = None) -> list[int]:
    """Token ids of the beginning of a text: all that are needed, and few more.

    Args:
        vocab_size: of the model that reads them.

    Raises:
        NblError: the text has tokens that the model lacks, or the tokenizer fails.
    """
    ids: list[int] = []
    for piece in _pieces(text.documents):
        try:
            ids.extend(tokenizer(piece, verbose=False)["input_ids"])
        except (TypeError, ValueError, LookupError, OverflowError) as error:  # settings of a wrong kind
            raise NblError(f"the model's tokenizer fails on {text.name} ({error!r}); fetch the model again") from error
        if len(ids) >= needed:
            break
    if vocab_size is not None and ids and max(ids) >= vocab_size:
        raise NblError(
            f"the tokenizer makes token {max(ids)} of {text.name}, and the model has {vocab_size}: they do not belong "
            "together; fetch the model's own tokenizer"
        )
    return ids


def _pieces(documents: Iterable[str]) -> Iterator[str]:
    """The documents; a very long document comes in pieces, split at line ends if possible."""
    for document in documents:
        begin = 0
        while begin < len(document):
            end = begin + _PIECE_CHARS
            if end < len(document):
                end = document.rfind("\n", begin, end) + 1 or end
            yield document[begin:end]
            begin = end


def extend(windows_WT: torch.Tensor, ids: Sequence[int], tokens: int, held_out: int) -> torch.Tensor:
    """Windows of `tokens` tokens: the first windows of a `pack`, and then windows from what follows in the text.

    Args:
        windows_WT: calibration windows that `pack_ids` gave for these ids.
        tokens: in all; fewer if the ids end.
        held_out: as given to `pack_ids`. All these tokens are skipped, even if `pack_ids` held back fewer.
    """
    import torch

    context = windows_WT.shape[1]
    wanted = max(1, tokens // context)
    if wanted <= len(windows_WT):
        return windows_WT[:wanted]
    passed = windows_WT.numel() + -(-held_out // context) * context
    following = torch.tensor(ids[passed : passed + (wanted - len(windows_WT)) * context], dtype=torch.long)
    return torch.cat([windows_WT, following[: len(following) // context * context].view(-1, context)])


def part_tokens(roles: tuple[str, ...], context: int) -> int:
    """Tokens of a text that have roles, in whole windows: no map is fitted or trained on these."""
    further = roles.count("test") * ((1 << LOOKS - 1) - 1)
    return (len(roles) + further) * _part_windows(roles, context) * context


def role_tokens(role: str, context: int) -> int:
    """Tokens of both texts with one role, in whole windows; those of the first look, of a test."""
    return sum(roles.count(role) * _part_windows(roles, context) * context for roles in PART_TOKENS)


def _part_windows(roles: tuple[str, ...], context: int) -> int:
    return -(-PART_TOKENS[roles] // context)


def early_stopping_tokens(context: int) -> int:
    """Tokens that layers are chosen by: of both texts, and of repeated passages."""
    return 2 * max(1, _JUDGING_TOKENS // context) * context + _REPEATED


def divide(windows_WT: torch.Tensor, roles: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Windows [windows, context] that decide, choose and are final; each window has one role.

    Roles are given run by run in the order of the text; fewer windows than runs have one run a role. Windows beyond
    all runs are of the test.

    Args:
        windows_WT: at least `FEWEST_WINDOWS` windows.
    """
    windows = len(windows_WT)
    count = min(windows, len(roles) * _part_windows(roles, windows_WT.shape[1]))
    runs = roles if count >= len(roles) else [role for role in dict.fromkeys(roles) if role != "unused"]
    given = [*(runs[k * len(runs) // count] for k in range(count)), *["test"] * (windows - count)]
    uses = ("validation", "selection", "test")
    return {use: windows_WT[[k for k in range(windows) if given[k] == use]] for use in uses}


def selection_texts(parts: Sequence[tuple[str, Any]], positions: int) -> list[tuple[str, Any]]:
    """Names and windows that layers are chosen by: few of the calibration text, as many of the second; passages twice.

    Losses of two layers are compared token by token, so few tokens give their order. Each token costs a pass of every
    candidate.

    Args:
        parts: name and selection windows of the calibration text, and of the second text if there is one.
        positions: of the model; no row is longer.
    """
    (name, windows_WT), *second = parts
    own = windows_WT[: max(1, _JUDGING_TOKENS // windows_WT.shape[1])]
    others = [(n, _spread(windows, len(own))) for n, windows in second]
    return [(name, own), *others, (TWICE, repeated(windows_WT, min(_REPEATED, positions)))]


def repeated(windows_WT: torch.Tensor, length: int) -> torch.Tensor:
    """One row of at most `length` tokens: short passages, and then the same passages in reverse order.

    Loss on the second half shows whether the model still finds and copies long-range tokens, as induction heads do
    (Olsson et al. 2022, In-context Learning and Induction Heads). Ordinary text hardly shows this.
    """
    import torch

    ids = torch.as_tensor(windows_WT).flatten()
    half = min(length, len(ids)) // 2
    passages = ids[: half - half % min(_PASSAGE, half)].view(-1, min(_PASSAGE, half))
    return torch.cat([passages, passages.flip(0)]).view(1, -1)


def _spread(windows_WT: Any, count: int) -> Any:
    """At most `count` windows, spread evenly from the first to the last."""
    count = min(count, len(windows_WT))
    last = len(windows_WT) - 1
    return windows_WT[[k * last // max(1, count - 1) for k in range(count)]]


def joined(rows_WT: Any, length: int) -> torch.Tensor:
    """Consecutive rows joined to rows of `length` tokens, the rest left out; the rows if too few, or longer."""
    import torch

    if rows_WT.shape[1] >= length:
        return torch.as_tensor(rows_WT)
    ids = torch.as_tensor(rows_WT).flatten()
    count = len(ids) // length
    return ids[: count * length].view(count, length) if count else torch.as_tensor(rows_WT)
