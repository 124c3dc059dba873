"""The text of a job: rows of token ids by what they are for, split once and read by every later stage.

    calibration text ─► windows, held_out, training, validation, selection, test ┐
    second text ──────► second.validation, second.selection, second.test ─────────┼─► one safetensors file
    tokenizer ────────► retrieval.selection.pairs, ... (`text.retrieval`) ────────┘

    windows                      maps are fitted on
    held_out                    nobody fits a map on, in the order of the text; verification takes its probes of it
    validation, selection, test    the same rows by use, see `windows`
    training                     maps are trained on: `windows`, and what follows in the text
    second.*                     absent if the second text is the calibration text, or is too short
    retrieval.*                  [rows, 2, length] by use and kind; absent if rows are too short

The hash of a part identifies what is made of it, so a stage runs again only if the tokens that it reads are others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.errors import CorruptError
from nbl_export.files import arrays_sha256
from nbl_export.records.inputs import Lazy
from nbl_export.text.corpus import Corpus
from nbl_export.text.retrieval import KINDS
from nbl_export.text.windows import (
    CALIBRATION_ROLES,
    SECOND_ROLES,
    divide,
    extend,
    pack,
    pack_ids,
    part_tokens,
    selection_texts,
    token_ids,
)

if TYPE_CHECKING:
    import torch

__all__ = ["JobText", "read", "rows_sha256", "save", "split_rows", "split_second"]

Texts = Sequence[tuple[str, Any]]  # name and token ids [windows, context] of each text


# -- cutting ---------------------------------------------------------------------------------------------------


def split_rows(
    text: Corpus, tokenizer: Any, tokens: int, context: int, training: int, vocab_size: int
) -> dict[str, torch.Tensor]:
    """The parts of a calibration text, which is tokenised once.

    Args:
        tokens: to calibrate on. training: tokens to train on.
        vocab_size: of the model that reads the rows.

    Raises:
        NblError: the text is too short for one window of each use, or has tokens that the model lacks.
    """
    held_out = part_tokens(CALIBRATION_ROLES, context)
    most = max(-(-tokens // context), training // context, 1) * context
    ids = token_ids(text, tokenizer, most + held_out, vocab_size)
    windows, held = pack_ids(text, ids, tokens, context, held_out)
    rows = {"windows": windows, "held_out": held, "training": extend(windows, ids, training, held_out)}
    return {**rows, **divide(held, CALIBRATION_ROLES)}


def split_second(text: Corpus, tokenizer: Any, context: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """The parts of the second text; nothing if it has too few windows."""
    rows, _ = pack(text, tokenizer, part_tokens(SECOND_ROLES, context), context, vocab_size=vocab_size)
    if len(rows) < len(SECOND_ROLES):
        return {}
    return {f"second.{use}": found for use, found in divide(rows, SECOND_ROLES).items()}


# -- the file --------------------------------------------------------------------------------------------------


def rows_sha256(rows_WT: torch.Tensor) -> str:
    """What identifies rows of token ids."""
    return arrays_sha256({"ids": rows_WT.numpy()})


def save(parts: Mapping[str, torch.Tensor], path: Path) -> dict[str, str]:
    """Write parts to a new file; returns the hash of each."""
    from safetensors.torch import save_file

    save_file({name: rows_WT.clone() for name, rows_WT in parts.items()}, path)
    return {name: rows_sha256(rows_WT) for name, rows_WT in parts.items()}


def read(path: Path, part: str) -> torch.Tensor:
    """One part of a file.

    Raises:
        CorruptError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            rows_WT: torch.Tensor = file.get_tensor(part)
            return rows_WT
    except (SafetensorError, OSError) as error:
        raise CorruptError(f"{path}, the text of the run, cannot be read ({error}); run its command again") from error


# -- reading ---------------------------------------------------------------------------------------------------


_PARTS = ("windows", "held_out", "training", "selection", "validation", "test")  # of the calibration text


class JobText:
    """Both texts of a job by use, each part read at first use; the module says what parts are for.

    Args:
        names: of the calibration text and of the second text.
        rows: part -> its rows.

    Attributes:
        early_stopping: held-out rows that choose the best step of a training. own_test: of the calibration text alone.
        validation, test: texts that decide how many layers a goal takes, and those of the final figures.
    """

    def __init__(self, names: tuple[str, str], rows: Mapping[str, Lazy[torch.Tensor]]) -> None:
        self.names = names
        self._rows = rows
        self.windows = rows["windows"]
        self.held_out = rows["held_out"]
        self.training = rows["training"]
        self.early_stopping = rows["selection"]
        self.own_test = rows["test"]
        self.validation = self._both("validation")
        self.test = self._both("test")

    @classmethod
    def of_file(cls, path: Path, names: tuple[str, str], hashes: Mapping[str, str]) -> JobText:
        """The text in a file that `save` wrote, with the hashes of its parts.

        Raises:
            CorruptError: a part has no hash.
        """
        if missing := [part for part in _PARTS if part not in hashes]:
            raise CorruptError(f"{path.parent} records no {missing[0]} part of its text; start over with --force")
        return cls(names, {part: Lazy(found, partial(read, path, part)) for part, found in hashes.items()})

    def selection(self, positions: int) -> Lazy[Texts]:
        """Texts that layers are chosen by, for a model of so many positions."""
        texts = self._both("selection")
        return Lazy(texts.identity, lambda: selection_texts(texts.value, positions))

    def retrieval(self, use: str) -> Lazy[Texts]:
        """Name and rows [rows, 2, length] of each kind of retrieval items (`text.retrieval`)."""
        rows = {f"retrieval: {kind}": self._rows.get(f"retrieval.{use}.{kind}") for kind in KINDS}
        found = {name: part for name, part in rows.items() if part is not None}
        identity = [part.identity for part in found.values()]
        return Lazy(identity, lambda: [(name, part.value) for name, part in found.items()])

    def _both(self, use: str) -> Lazy[Texts]:
        """Name and rows of the calibration text, and of the second text if there is one."""
        own, second = self.names
        named = {f"held back from {own}": use, f"{second} (not calibrated on)": f"second.{use}"}
        rows = {name: self._rows[part] for name, part in named.items() if part in self._rows}
        identity = [part.identity for part in rows.values()]
        return Lazy(identity, lambda: [(name, part.value) for name, part in rows.items()])
