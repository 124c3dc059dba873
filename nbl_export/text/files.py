"""Reads the documents of a text file, piece by piece.

    FILE.txt                one document
    FILE.jsonl, FILE.json   the field `text` of each object
    any of them as .gz      unpacked during reading

At most `READ_BYTES` of the unpacked text are read, so memory is bounded for a file of any size. The hash covers the
whole file on disk, packed or not: equal hashes give equal documents.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nbl_export.errors import NblError
from nbl_export.files import stream_sha256

__all__ = ["READ_BYTES", "FileText", "read_file"]

READ_BYTES = 64 << 20  # most bytes of one text: some fifteen million tokens
_LINE_CHARS = 8 << 20  # most characters of one line of JSON
_JSON_BYTES = 32 << 20  # most characters of a .json, which is parsed whole
_BLOCK_BYTES = 1 << 20
_PROBED_BYTES = 1 << 16  # a file with zeros among these is binary


@dataclass(frozen=True)
class FileText:
    """Documents of a file, the SHA-256 of the whole file, and whether it holds more than was read."""

    sha256: str
    documents: tuple[str, ...]
    cut: bool


def read_file(path: Path) -> FileText:
    """Read the beginning of a text file.

    Raises:
        NblError: the file is unreadable, empty, binary, not UTF-8, not JSON, or without a text field.
    """
    try:
        with path.open("rb") as stream:
            reader = _Reader(path, stream)
            documents = tuple(document for document in _documents(path, reader) if document.strip())
            if not documents:
                raise NblError(f"calibration text {path} {'is empty' if reader.blank else 'holds no text'}")
            stream.seek(0)
            return FileText(stream_sha256(stream), documents, reader.cut)
    except OSError as error:
        raise NblError(f"calibration text {path} cannot be read: {error.strerror}") from error


class _Reader:
    """Decoded pieces of a file. After the last piece, `cut`: the file holds more; `blank`: all pieces were blank."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self._path = path
        self._stream: Any = gzip.GzipFile(fileobj=stream) if path.suffix == ".gz" else stream
        self.cut = False
        self.blank = True

    def pieces(self) -> Iterator[str]:
        """The text, one block at a time."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        passed = 0
        while block := self._read(min(_BLOCK_BYTES, READ_BYTES - passed)):
            if passed == 0 and b"\0" in block[:_PROBED_BYTES]:
                raise NblError(f"calibration text {self._path} is a binary file; give UTF-8 text, .jsonl or .json")
            self.blank = self.blank and not block.strip()
            yield self._decoded(decoder, block, passed)
            passed += len(block)
        self.cut = passed >= READ_BYTES and bool(self._read(1))
        if not self.cut:
            yield self._decoded(decoder, b"", passed)

    def _read(self, size: int) -> bytes:
        try:
            return bytes(self._stream.read(size))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise NblError(
                f"calibration text {self._path} is truncated or not a gzip file ({error}); fetch it again"
            ) from error

    def _decoded(self, decoder: codecs.IncrementalDecoder, block: bytes, passed: int) -> str:
        waiting = len(decoder.getstate()[0])
        try:
            return decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise NblError(
                f"calibration text {self._path} is not UTF-8 (byte {passed - waiting + error.start}); "
                "convert it with iconv"
            ) from error


def _documents(path: Path, reader: _Reader) -> Iterator[str]:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix == ".jsonl":
        yield from (_field(path, number, line) for number, line in _lines(path, reader))
    elif suffix == ".json":
        yield from _rows(path, reader)
    else:
        yield "".join(reader.pieces())


def _lines(path: Path, reader: _Reader) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank; a last line that the reading limit cut is left out."""
    number, rest = 1, ""
    for piece in reader.pieces():
        if not rest and not piece.strip():  # keeps a million blank lines cheap
            number += piece.count("\n")
            continue
        *lines, rest = (rest + piece).split("\n")
        if len(rest) > _LINE_CHARS:
            raise NblError(
                f"calibration text {path}, line {number + len(lines)} is longer than {_LINE_CHARS >> 20} Mi "
                "characters; cut it into several documents"
            )
        yield from ((n, line) for n, line in enumerate(lines, number) if line.strip())
        number += len(lines)
    if rest.strip() and not reader.cut:
        yield number, rest


def _rows(path: Path, reader: _Reader) -> Iterator[str]:
    pieces: list[str] = []
    for piece in reader.pieces():
        pieces.append(piece)
        if sum(map(len, pieces)) > _JSON_BYTES:
            raise NblError(
                f"calibration text {path} is a list of more than {_JSON_BYTES >> 20} Mi characters; "
                "write it as .jsonl, one object a line"
            )
    if reader.blank:
        return
    try:
        rows = json.loads("".join(pieces))
    except (ValueError, RecursionError) as error:
        raise NblError(f"calibration text {path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise NblError(f"calibration text {path} must be a JSON list of objects with a text field")
    yield from (_text_of(path, number, row) for number, row in enumerate(rows, 1))


def _field(path: Path, number: int, line: str) -> str:
    try:
        return _text_of(path, number, json.loads(line))
    except (ValueError, RecursionError) as error:
        raise NblError(f"calibration text {path}, line {number} is not JSON: {error}") from error


def _text_of(path: Path, number: int, row: Any) -> str:
    value = row.get("text") if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise NblError(f"calibration text {path}, entry {number} has no text field")
    return value
