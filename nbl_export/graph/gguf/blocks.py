"""Codes of a GGUF's blocks: integers, a scale a block, and an offset a block for types with a minimum.

    W[n, k]  =  scale[n, k // size] * (code[n, k] - zero)  +  offset[n, k // size]

The right side equals the dequantised tensor in every bit of float32. The products are exact, because a scale has at
most 18 significant bits, and a code 5, or 8 beside a scale of 11. The sum is rounded once, as in the original. The
layouts of blocks are llama.cpp's (ggml-common.h).

`RowIndex` finds the codes of a float32 matrix by the values of its rows:

    graph: W [N, K] float32 ─► rows of the file's dequantised tensors with the same bits ─► codes of these rows

An exporter may join q, k and v, permute rows for its rotary embedding, or name matrices as it likes. Rows are
recognised by their values, so none of this matters, and every matrix that is found is exact.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.errors import NblError
from nbl_export.graph.gguf.content import Content, Tensor
from nbl_export.records.quantised import Blocks

__all__ = ["RowIndex", "block_codes", "check_type", "is_coded", "is_known", "known_types"]

_FLOATS = ("F32", "F16", "BF16")
_SUPER = 256  # elements of a K-quant's super-block


_KEPT = 4  # tensors whose codes stay in memory: q, k and v come together


@dataclass(frozen=True)
class _Type:
    """How a type's blocks are read: bytes [blocks, bytes of a block] -> codes q, scales and minima.

    bits: of the stored code. centre: the q that stands for 0. size: elements that share a scale.
    """

    bits: int
    size: int
    centre: int
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray | None]]


def is_coded(tensor: Tensor) -> bool:
    """Whether a tensor is a matrix in codes."""
    return len(tensor.shape) == 2 and tensor.kind.name not in _FLOATS


def known_types() -> tuple[str, ...]:
    """Names of the types that can be read."""
    return tuple(_TYPES)


def is_known(kind: str) -> bool:
    """Whether blocks of this type can be read, or are float."""
    return kind in (*_TYPES, *_FLOATS)


def check_type(tensor: str, kind: str) -> None:
    """Check that the blocks of a matrix can be read.

    Raises:
        NblError: the type is not known.
    """
    if not is_known(kind):
        raise NblError(
            f"{tensor} has the type {kind}, whose blocks cannot be taken over; known are {', '.join(_TYPES)}; "
            "quantise the model again with --requantize"
        )


def block_codes(tensor: Tensor) -> Blocks:
    """The codes of a matrix.

    Raises:
        NblError: the type is not known.
    """
    name = tensor.kind.name
    check_type(tensor.name, name)
    kind, (rows, columns) = _TYPES[name], tensor.shape
    stored = np.ascontiguousarray(tensor.read()).view(np.uint8).reshape(rows, -1)
    q, scales, minima = kind.read(stored.reshape(-1, _block_bytes(tensor.kind)))
    middle = 2 ** (kind.bits - 1)
    codes, scales = q.reshape(rows, columns).astype(np.int16) + (middle - kind.centre), scales.reshape(rows, -1)
    zero, offsets = middle, None
    if minima is not None:
        minima = minima.reshape(rows, -1)
        exact = minima.astype(np.float64) + kind.centre * scales.astype(np.float64)
        offsets = exact.astype(np.float32)
        if not np.array_equal(offsets, exact):  # the code 0 then stands for 0, on a kernel that is some 10% slower
            zero, offsets = middle - kind.centre, minima
    return Blocks(codes.astype(np.uint8), scales, kind.size, float(zero), offsets, kind.bits)


def _block_bytes(kind: Any) -> int:
    from gguf import GGML_QUANT_SIZES

    return int(GGML_QUANT_SIZES[kind][1])


# -- fields of a block ---------------------------------------------------------------------------------


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """A float16 field as float32 [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """All low nibbles, then all high ones: [..., 2 * bytes]."""
    return np.concatenate([packed & 15, packed >> 4], -1)


def _bits(packed: np.ndarray, width: int) -> np.ndarray:
    """Fields of `width` bits, lowest first: [..., 8 / width, bytes]."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return (packed[..., None, :] >> shifts) & (2**width - 1)


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of six bits each, from 12 bytes (ggml-quants.c, get_scale_min_k4)."""
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], 1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], 1)
    return scales.astype(np.float32), minima.astype(np.float32)


# -- types ---------------------------------------------------------------------------------------------

_Read = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _q4_0(b: np.ndarray) -> _Read:
    return _nibbles(b[:, 2:18]), _half(b, 0), None


def _q4_1(b: np.ndarray) -> _Read:
    return _nibbles(b[:, 4:20]), _half(b, 0), _half(b, 2)


def _fifth(packed: np.ndarray) -> np.ndarray:
    """The fifth bits of 32 codes, from four bytes: 0 or 16."""
    return np.unpackbits(packed, axis=1, bitorder="little") << 4


def _q5_0(b: np.ndarray) -> _Read:
    return _nibbles(b[:, 6:22]) | _fifth(b[:, 2:6]), _half(b, 0), None


def _q5_1(b: np.ndarray) -> _Read:
    return _nibbles(b[:, 8:24]) | _fifth(b[:, 4:8]), _half(b, 0), _half(b, 2)


def _q8_0(b: np.ndarray) -> _Read:
    return b[:, 2:34].view(np.int8), _half(b, 0), None


def _q2_k(b: np.ndarray) -> _Read:
    q = _bits(b[:, 16:80].reshape(-1, 2, 32), 2)
    return q, _half(b, 80) * (b[:, :16] & 15), -_half(b, 82) * (b[:, :16] >> 4)


def _q3_k(b: np.ndarray) -> _Read:
    low = _bits(b[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, _SUPER)
    high = _bits(b[:, :32], 1).reshape(-1, _SUPER)
    first, last = _nibbles(b[:, 96:104]), _bits(b[:, 104:108], 2).reshape(-1, 16)
    scales = (first | (last << 4)).astype(np.int8) - 32
    return low | (high << 2), _half(b, 108) * scales, None


def _q4_k(b: np.ndarray) -> _Read:
    scales, minima = _six_bits(b[:, 4:16])
    return _nibbles(b[:, 16:144].reshape(-1, 4, 32)), _half(b, 0) * scales, -_half(b, 2) * minima


def _q5_k(b: np.ndarray) -> _Read:
    scales, minima = _six_bits(b[:, 4:16])
    low = _nibbles(b[:, 48:176].reshape(-1, 4, 32)).reshape(-1, _SUPER)
    return low | (_bits(b[:, 16:48], 1).reshape(-1, _SUPER) << 4), _half(b, 0) * scales, -_half(b, 2) * minima


def _q6_k(b: np.ndarray) -> _Read:
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, _SUPER)
    high = _bits(b[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, _SUPER)
    return low | (high << 4), _half(b, 208) * b[:, 192:208].view(np.int8), None


_TYPES = {
    "Q4_0": _Type(4, 32, 8, _q4_0),
    "Q4_1": _Type(4, 32, 8, _q4_1),
    "Q5_0": _Type(8, 32, 16, _q5_0),
    "Q5_1": _Type(8, 32, 0, _q5_1),
    "Q8_0": _Type(8, 32, 0, _q8_0),
    "Q2_K": _Type(4, 16, 0, _q2_k),
    "Q3_K": _Type(4, 16, 4, _q3_k),
    "Q4_K": _Type(4, 32, 8, _q4_k),
    "Q5_K": _Type(8, 32, 0, _q5_k),
    "Q6_K": _Type(8, 16, 32, _q6_k),
}


class RowIndex:
    """The rows of all matrices of a file.

    Raises:
        NblError: a matrix has a type whose blocks are not known.
    """

    def __init__(self, content: Content) -> None:
        self._tensors = [t for t in content.tensors if len(t.shape) == 2]
        self._rows: dict[int, dict[int, int]] = {}  # digest -> tensor -> its first row with this digest
        self._codes = functools.lru_cache(maxsize=_KEPT)(lambda i: block_codes(self._tensors[i]))
        for number, tensor in enumerate(self._tensors):
            values = self._codes(number).values if is_coded(tensor) else tensor.values()
            for row, digest in enumerate(_digests(values)):
                self._rows.setdefault(digest, {}).setdefault(number, row)

    def codes_of(self, matrix_NK: np.ndarray) -> list[Blocks] | None:
        """Codes of a matrix, in parts of consecutive rows with one form; [] if the file stores the rows as floats.

        None if the file does not have these rows.
        """
        places = [self._rows.get(digest, {}) for digest in _digests(matrix_NK)]
        if not all(places):
            return None
        found = _chosen(places)
        coded = {is_coded(self._tensors[n]) for n in np.unique(found[:, 0])}
        if coded != {True}:
            return [] if coded == {False} else None
        parts = [self._part(found[a:b]) for a, b in self._runs(found)]
        same = np.concatenate([part.values for part in parts])
        return parts if np.array_equal(same, matrix_NK) else None

    def _runs(self, found: np.ndarray) -> Iterator[tuple[int, int]]:
        """First row and end of each run of rows with one form."""
        forms = {int(n): self._form(int(n)) for n in np.unique(found[:, 0])}
        start = 0
        for i in range(1, len(found) + 1):
            if i == len(found) or forms[int(found[i, 0])] != forms[int(found[start, 0])]:
                yield start, i
                start = i

    def _form(self, number: int) -> tuple[Any, ...]:
        codes = self._codes(number)
        return codes.bits, codes.size, float(codes.zeros), codes.offsets is None

    def _part(self, found: np.ndarray) -> Blocks:
        """The rows of a run, each from its tensor."""
        first = self._codes(int(found[0, 0]))
        made = {name: np.empty((len(found), *getattr(first, name).shape[1:]), getattr(first, name).dtype)
                for name in ("codes", "scales", "offsets") if getattr(first, name) is not None}  # fmt: skip
        for number in np.unique(found[:, 0]):
            mine = found[:, 0] == number
            for name, array in made.items():
                array[mine] = getattr(self._codes(int(number)), name)[found[mine, 1]]
        return dataclasses.replace(first, codes=made["codes"], scales=made["scales"], offsets=made.get("offsets"))


def _chosen(places: list[dict[int, int]]) -> np.ndarray:
    """Tensor and row of each row [N, 2]. Equal rows (of unused tokens) come from the tensor with most of the rows."""
    counts = Counter(number for place in places for number in place)
    numbers = [max(place, key=counts.__getitem__) for place in places]
    return np.array([(n, place[n]) for n, place in zip(numbers, places, strict=True)], np.int64)


def _digests(values_NK: np.ndarray) -> Iterator[int]:
    """A number for each row, equal for equal bytes; `codes_of` compares the values themselves."""
    for row in np.ascontiguousarray(values_NK, np.float32):
        yield hash(row.tobytes())
