"""Cuts text into token windows of one length."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from nbl_export.errors import NblError
from nbl_export.text.corpus import Text
from nbl_export.text.held_back import FEWEST_WINDOWS

if TYPE_CHECKING:
    import torch

__all__ = ["extend", "pack"]

log = logging.getLogger(__name__)

# A call of a tokenizer takes some 500 bytes of memory for each character, and reads all that it is given.
_PIECE_CHARS = 1 << 16


def pack(
    text: Text, tokenizer: Any, tokens: int, context: int, held_back: int = 0, vocab_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenize and cut into full windows, packed and never padded.

    Args:
        vocab_size: of the model that reads the windows.

    Returns:
        ids [windows, context] for calibration, and held-back ids [held, context] from the end of what was read. If the
        text is too short for all, the rest after calibration is held back: at least an eighth of the windows, and at
        least `held_back.FEWEST_WINDOWS`, if any are requested.

    Raises:
        NblError: the text is too short for one window of each, or has tokens that the model lacks.
    """
    import torch

    wanted, spare = max(1, -(-tokens // context)), -(-held_back // context)
    needed = (wanted + spare) * context
    ids = _ids(text, tokenizer, needed, vocab_size)
    windows = min(len(ids), needed) // context
    held = min(spare, max(FEWEST_WINDOWS, windows // 8, windows - wanted))
    if windows - held < 1:
        raise NblError(
            f"calibration text {text.name} is too short: {len(ids)} tokens, "
            f"{(1 + held) * context} are needed for a context of {context}; give more text or a smaller --context"
        )
    rows = torch.tensor(ids[: windows * context], dtype=torch.long).view(windows, context)
    used = min(wanted, windows - held)
    parts = (used, wanted, "tokens to calibrate on"), (held, spare, "held-back tokens")
    short = [f"{have * context:,} of {asked * context:,} {name}" for have, asked, name in parts if have < asked]
    if short:
        ended = f", since {text.ended_by} ends there" if text.ended_by else ""
        ended += ", and only the first part of a long text is read" if text.cut else ""
        log.warning("calibration text %s is shorter than asked: it gives %s%s", text.name, " and ".join(short), ended)
    return rows[:used], rows[windows - held :]


def _ids(text: Text, tokenizer: Any, needed: int, vocab_size: int | None = None) -> list[int]:
    """Token ids of the beginning of a text: all that are needed, and few more."""
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
    """The documents; a very long document comes in pieces, cut at line ends if possible."""
    for document in documents:
        begin = 0
        while begin < len(document):
            end = begin + _PIECE_CHARS
            if end < len(document):
                end = document.rfind("\n", begin, end) + 1 or end
            yield document[begin:end]
            begin = end


def extend(windows_WT: torch.Tensor, text: Text, tokenizer: Any, tokens: int, held_back: int) -> torch.Tensor:
    """Windows of `tokens` tokens: the first windows of a `pack`, and then windows from what follows in the text.

    Args:
        windows_WT: calibration windows that `pack` gave for this text.
        tokens: in all; fewer if the text ends.
        held_back: as given to `pack`. All these tokens are skipped, even if `pack` held back fewer.
    """
    import torch

    context = windows_WT.shape[1]
    wanted = max(1, tokens // context)
    if wanted <= len(windows_WT):
        return windows_WT[:wanted]
    passed = windows_WT.numel() + -(-held_back // context) * context
    needed = passed + (wanted - len(windows_WT)) * context
    ids = _ids(text, tokenizer, needed)
    following = torch.tensor(ids[passed:needed], dtype=torch.long)
    return torch.cat([windows_WT, following[: len(following) // context * context].view(-1, context)])
