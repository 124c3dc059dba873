"""Moments on disk: one float64 safetensors file of a calibration, finished or not.

    layers.{i}.{tap}.{x_sum,y_sum,yx}            sums over the rows, about the reference row
    layers.{i}.{tap}.{xx,yy}_upper               of symmetric sums, the rows of the upper triangle in their order
    layers.{i}.{tap}.{x_ref,y_ref,x_unit,y_unit} see `sums`
    metadata "moments", JSON: count, num_layers, taps;
        identity   what the sums depend on (model, text, windows, context, taps, products, number of batches)
        done       batches in the sums
        sha256     of the tensors' bytes

The file is written layer by layer, so only one layer's sums need to be in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nbl_export.errors import CorruptError
from nbl_export.files import replacing, safetensors_header
from nbl_export.methods.sums import Sums, mirrored

if TYPE_CHECKING:
    import torch

__all__ = ["MomentsFile", "MomentsWriter", "open_moments"]

# Name in the file -> field of `Sums`.
_FIELDS = {
    name: name.removesuffix("_upper")
    for name in ("x_sum", "y_sum", "xx_upper", "yx", "yy_upper", "x_ref", "y_ref", "x_unit", "y_unit")
}
_NO_HASH = "0" * 64


class MomentsWriter:
    """Context manager that writes a moments file layer by layer. The file appears complete or not at all."""

    def __init__(self, path: Path, facts: Mapping[str, Any], num_layers: int, taps: Sequence[str], size: int) -> None:
        self.path = path
        self._open = contextlib.ExitStack()
        self._taps = tuple(taps)
        self._written = 0
        self._num_layers = num_layers
        stated = {**facts, "num_layers": num_layers, "taps": list(taps), "sha256": _NO_HASH}
        shapes = {"yx": [size, size], "xx_upper": [size * (size + 1) // 2], "yy_upper": [size * (size + 1) // 2]}
        names = _names(num_layers, self._taps)
        tensors = {name: ("F64", shapes.get(name.rpartition(".")[2], [size])) for name in names}
        self._header, _ = safetensors_header(tensors, {"moments": json.dumps(stated)})

    def __enter__(self) -> MomentsWriter:
        self._stream = self._open.enter_context(replacing(self.path))
        self._digest = hashlib.sha256()
        self._stream.write(self._header)
        return self

    def write(self, layer: Mapping[str, Sums]) -> None:
        """Write the next layer's sums, by tap."""
        for tap in self._taps:
            for name, field in _FIELDS.items():
                value = getattr(layer[tap], field)
                for row in _upper(value) if name.endswith("_upper") else (value,):
                    raw = memoryview(row.contiguous().numpy().astype("<f8", copy=False)).cast("B")
                    self._digest.update(raw)
                    self._stream.write(raw)
        self._written += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._open.__exit__(kind, error, at)
            return
        with self._open:
            assert self._written == self._num_layers
            self._stream.seek(self._header.index(_NO_HASH.encode()))
            self._stream.write(self._digest.hexdigest().encode())


class MomentsFile:
    """An open moments file: its facts, and the sums of one layer at a time. Use `open_moments`."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path = path
        self._file = file
        self.facts: dict[str, Any] = json.loads(file.metadata()["moments"])
        self.num_layers = int(self.facts["num_layers"])
        self.taps = tuple(self.facts["taps"])
        self.is_complete = self.facts["done"] == self.facts["identity"]["batches"]
        names = set(file.keys())
        for name in _names(self.num_layers, self.taps):
            if name not in names:
                raise KeyError(f"{name} is missing")

    def check(self) -> None:
        """Compare the tensors with their hash.

        Raises:
            CorruptError: the hash differs.
        """
        digest = hashlib.sha256()
        with self.path.open("rb") as stream:
            stream.seek(8 + int.from_bytes(stream.read(8), "little"))
            while block := stream.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != self.facts.get("sha256"):
            raise CorruptError(f"{self.path} is corrupted: its content is not what was written; run calibrate again")

    def sums(self, layer: int, tap: str) -> Sums:
        """The sums of a layer."""
        found = {}
        for name, field in _FIELDS.items():
            value = self._file.get_tensor(f"layers.{layer}.{tap}.{name}")
            found[field] = _symmetric(value) if name.endswith("_upper") else value
        return Sums(int(self.facts["count"]), **found)


def _upper(square: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows of the upper triangle of a symmetric matrix, diagonal included."""
    return (row[i:] for i, row in enumerate(square))


def _symmetric(upper: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix whose upper triangle has these rows, one after another."""
    size = math.isqrt(2 * len(upper))
    square = upper.new_zeros(size, size)
    begin = 0
    for i, row in enumerate(square):
        row[i:] = upper[begin : begin + size - i]
        begin += size - i
    return mirrored(square)


def _names(num_layers: int, taps: Sequence[str]) -> Iterator[str]:
    for i in range(num_layers):
        for tap in taps:
            for field in _FIELDS:
                yield f"layers.{i}.{tap}.{field}"


@contextlib.contextmanager
def open_moments(path: Path, *, whole: bool = True) -> Iterator[MomentsFile]:
    """Open a moments file.

    Args:
        whole: refuse the sums of an unfinished calibration.

    Raises:
        CorruptError: the file is missing, truncated, refused, or not a moments file.
    """
    from safetensors import SafetensorError, safe_open

    with contextlib.ExitStack() as stack:
        try:
            found = MomentsFile(path, stack.enter_context(safe_open(str(path), framework="pt")))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptError(f"{path} is not a moments file ({error}); run calibrate again") from error
        if whole and not found.is_complete:
            raise CorruptError(f"{path} is of a calibration that was not finished; run calibrate again")
        yield found
