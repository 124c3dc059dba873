"""Sums of a calibration on disk: one float64 safetensors file of named tensors, finished or not.

    metadata "sums", JSON:
        identity   what the sums depend on (model, text, products, what is collected, number of batches)
        done       batches in the sums
        count      rows in the sums
        sha256     of the tensors' bytes, in the order of the file

A method names its tensors. The file is written tensor by tensor, so that one layer's sums need to be in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nbl_export.errors import CorruptError
from nbl_export.files import parse_json, replacing, safetensors_header
from nbl_export.records.from_json import check_shape, require

if TYPE_CHECKING:
    import torch

__all__ = ["SumsFile", "SumsWriter", "open_sums"]

_NO_HASH = "0" * 64
_FACTS = {"identity": {"batches": int}, "done": int, "count": int, "sha256": str}


class SumsWriter:
    """Context manager that writes a file of sums. The file appears complete or not at all.

    Args:
        facts: "identity", "done" and "count".
        shapes: of all tensors, in the order in which they are written.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
        self.path = path
        self._open = contextlib.ExitStack()
        self._left = list(shapes.items())[::-1]
        tensors = {name: ("F64", list(shape)) for name, shape in shapes.items()}
        self._header, _ = safetensors_header(tensors, {"sums": json.dumps({**facts, "sha256": _NO_HASH})})

    def __enter__(self) -> SumsWriter:
        self._stream = self._open.enter_context(replacing(self.path))
        self._digest = hashlib.sha256()
        self._stream.write(self._header)
        return self

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the next tensors, on any device."""
        for name, value in tensors.items():
            expected = self._left.pop()
            assert (name, tuple(value.shape)) == (expected[0], tuple(expected[1])), f"{name} is not {expected}"
            raw = memoryview(value.cpu().contiguous().numpy().astype("<f8", copy=False).reshape(-1)).cast("B")
            self._digest.update(raw)
            self._stream.write(raw)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._open.__exit__(kind, error, at)
            return
        with self._open:
            assert not self._left
            self._stream.seek(self._header.index(_NO_HASH.encode()))
            self._stream.write(self._digest.hexdigest().encode())


class SumsFile:
    """An open file of sums: its facts, and one tensor at a time. Use `open_sums`.

    Attributes:
        shapes: of all tensors, by name.
    """

    def __init__(self, path: Path, file: Any) -> None:
        self.path = path
        self._file = file
        self.facts: dict[str, Any] = parse_json(file.metadata()["sums"])
        check_shape(self.facts, _FACTS)
        self.count: int = self.facts["count"]
        done = self.facts["done"]
        batches = self.facts["identity"]["batches"]
        require(self.count >= 1 and 1 <= done <= batches, f"it counts {self.count} rows of {done} batches")
        self.is_complete = done == batches
        self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

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
        if digest.hexdigest() != self.facts["sha256"]:
            raise CorruptError(f"{self.path} is corrupted: its content is not what was written; run calibrate again")

    def require(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Refuse a file that does not hold exactly these tensors.

        Raises:
            CorruptError: a tensor is missing, has another shape, or is unknown.
        """
        wanted = {name: tuple(shape) for name, shape in shapes.items()}
        if wanted != self.shapes:
            differing = sorted(name for name in wanted | self.shapes if wanted.get(name) != self.shapes.get(name))
            raise CorruptError(
                f"{self.path} holds other sums than its model has ({differing[0]}, for one); run calibrate again"
            )

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor in float64, on the CPU.

        Raises:
            CorruptError: there is no such tensor.
        """
        if name not in self.shapes:
            raise CorruptError(f"{self.path} holds no sums {name}; run calibrate again")
        value: torch.Tensor = self._file.get_tensor(name).double()
        return value


def open_sums(path: Path, *, whole: bool = True) -> SumsFile:
    """Open a file of sums, which stays open as long as the object lives.

    Args:
        whole: refuse the sums of an unfinished calibration.

    Raises:
        CorruptError: the file is missing, truncated, refused, or no file of sums.
    """
    from safetensors import SafetensorError, safe_open

    try:
        found = SumsFile(path, safe_open(str(path), framework="pt"))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(f"{path} is no file of sums ({error}); run calibrate again") from error
    if whole and not found.is_complete:
        raise CorruptError(f"{path} is of a calibration that was not finished; run calibrate again")
    return found
