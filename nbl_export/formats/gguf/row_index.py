"""Finds the codes of a float32 matrix in a GGUF file by the values of its rows.

    graph: W [N, K] float32 ─► rows of the file's dequantised tensors with the same bits ─► codes of these rows

An exporter may join q, k and v, permute rows for its rotary embedding, or name matrices as it likes. Rows are
recognised by their values, so none of this matters, and every matrix that is found is exact.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from nbl_export.formats.gguf.blocks import block_codes, is_coded
from nbl_export.formats.gguf.content import Content
from nbl_export.records.quantised import Blocks

__all__ = ["RowIndex"]

_KEPT = 4  # tensors whose codes stay in memory: q, k and v come together


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
