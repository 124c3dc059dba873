"""The head of a GGUF file: its keys and the shapes of its tensors, without the gguf package and without the tensors.

    magic, version, number of tensors, number of keys ─► keys ─► name, dimensions, type and place of each tensor

Of an array only the length is kept: the words of a vocabulary take gguf's own reader seconds. That reader also makes
an object for each element that a file states, and checks no count. So `pretrained.reader` reads the head here first.
Source: the format's specification (ggml, docs/gguf.md).
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
_TEXT = 8
_ARRAY = 9
_MOST_DIMENSIONS = 4
# A large vocabulary, Gemma's, has 1.3 million elements: words, scores, types and merges, five for each word.
_MOST_KEYS = 1 << 12
_MOST_TENSORS = 1 << 16
_MOST_ELEMENTS = 3 << 19
_MOST_PER_WORD = 8
_MOST_BYTES = 1 << 27


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
        CorruptError: the file is no GGUF file, is cut short, or states more than any model has.
    """
    with path.open("rb") as stream:
        head = _Head(stream)
        try:
            if head.read(4) != b"GGUF" or head.number("I") not in (2, 3):
                raise ValueError("it does not begin as GGUF 2 or 3")
            tensors = head.number("Q")
            count = head.number("Q")
            _refuse_more(count, _MOST_KEYS, "keys")
            _refuse_more(tensors, _MOST_TENSORS, "tensors")
            keys = {head.text(): _value(head, head.number("I")) for _ in range(count)}
            shapes = dict(_shape(head) for _ in range(tensors))
            words = shapes.get("token_embd.weight", (0,))[0]
            _refuse_more(_MOST_ELEMENTS - head.elements, _MOST_KEYS + _MOST_PER_WORD * words, "elements of arrays")
            return Header(keys, shapes)
        except ValueError as error:
            raise CorruptError(f"{path} is truncated or not a GGUF file ({error}); fetch it again") from error


def _refuse_more(count: int, most: int, what: str) -> None:
    if count > most:
        raise ValueError(f"it states {count:,} {what}, and at most {most:,} are read")


class _Head:
    """The head of an open file; `bytes` and `elements` may still be read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.bytes = _MOST_BYTES
        self.elements = _MOST_ELEMENTS

    def read(self, size: int) -> bytes:
        _refuse_more(size, self.bytes, "bytes")
        self.bytes -= size
        found = self._stream.read(size)
        if len(found) != size:
            raise ValueError("it ends inside a key")
        return found

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.read(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.read(self.number("Q")).decode("utf-8", "replace")


def _value(head: _Head, kind: int) -> Any:
    if kind == _TEXT:
        return head.text()
    if kind != _ARRAY:
        return head.number(_form(kind))
    of = head.number("I")
    length = head.number("Q")
    _refuse_more(length, head.elements, "elements of arrays")
    head.elements -= length
    if of != _TEXT:
        head.read(length * struct.calcsize(_form(of)))
    else:
        for _ in range(length):
            head.read(head.number("Q"))
    return length


def _form(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"a key has the unknown type {kind}")
    return _NUMBERS[kind]


def _shape(head: _Head) -> tuple[str, tuple[int, ...]]:
    name = head.text()
    dimensions = head.number("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"the tensor {name} has {dimensions} dimensions")
    shape = tuple(head.number("Q") for _ in range(dimensions))
    head.number("I"), head.number("Q")  # type and place
    return name, shape[::-1]
