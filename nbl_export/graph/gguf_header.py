"""The head of a GGUF file: its keys and the shapes of its tensors, without the gguf package and without the tensors.

    magic, version, number of tensors, number of keys ─► keys ─► name, dimensions, type and place of each tensor

Of an array only the length is kept: the words of a vocabulary take gguf's own reader seconds. Source: the format's
specification (ggml, docs/gguf.md).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nbl_export.errors import CorruptError

__all__ = ["Header", "read_header"]

# Type of a value -> its form for `struct`.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class Header:
    """keys: numbers and texts by name; the length of an array. shapes: of tensors, outermost dimension first."""

    keys: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    def get(self, name: str) -> Any:
        """Value of a key of the architecture, by its name without the prefix; None without the key."""
        return self.keys.get(f"{self.keys.get('general.architecture')}.{name}")


def read_header(path: Path) -> Header:
    """The head of a file.

    Raises:
        CorruptError: the file is no GGUF file or is cut short.
    """
    with path.open("rb") as stream:
        try:
            if stream.read(4) != b"GGUF" or _number(stream, "I") not in (2, 3):
                raise ValueError("it does not begin as GGUF 2 or 3")
            tensors, count = _number(stream, "Q"), _number(stream, "Q")
            keys = {_text(stream): _value(stream, _number(stream, "I")) for _ in range(count)}
            return Header(keys, dict(_shape(stream) for _ in range(tensors)))
        except (struct.error, ValueError) as error:
            raise CorruptError(f"{path} is truncated or not a GGUF file ({error}); fetch it again") from error


def _number(stream: BinaryIO, form: str) -> Any:
    return struct.unpack(f"<{form}", stream.read(struct.calcsize(form)))[0]


def _text(stream: BinaryIO) -> str:
    return _bytes(stream, _number(stream, "Q")).decode("utf-8", "replace")


def _bytes(stream: BinaryIO, size: int) -> bytes:
    found = stream.read(min(size, 1 << 30))
    if len(found) != size:
        raise ValueError("it ends inside a key")
    return found


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(stream)
    if kind != _ARRAY:
        return _number(stream, _form(kind))
    of, length = _number(stream, "I"), _number(stream, "Q")
    if of != _TEXT:
        _bytes(stream, length * struct.calcsize(_form(of)))
    else:
        for _ in range(length):
            _bytes(stream, _number(stream, "Q"))
    return length


def _form(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"a key has the unknown type {kind}")
    return _NUMBERS[kind]


def _shape(stream: BinaryIO) -> tuple[str, tuple[int, ...]]:
    name, dimensions = _text(stream), _number(stream, "I")
    if dimensions > _MOST_DIMENSIONS:
        raise ValueError(f"the tensor {name} has {dimensions} dimensions")
    shape = tuple(_number(stream, "Q") for _ in range(dimensions))
    _number(stream, "I"), _number(stream, "Q")  # type and place
    return name, shape[::-1]
