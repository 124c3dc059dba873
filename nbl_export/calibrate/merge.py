"""Merges the shards of one calibration, from run directories or moments files.

Shards are added in the order of their numbers, layer by layer. Neither the order on the command line nor the number of
shards changes a bit of the result. This holds if all shards were collected with equal float32 arithmetic: the same
kind of machine and number of threads. Otherwise results differ by the rounding of that arithmetic.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nbl_export.calibrate.moments_file import MomentsFile, MomentsWriter, open_moments
from nbl_export.calibrate.sums import Sums
from nbl_export.errors import CorruptError, NblError
from nbl_export.options.options import JobOptions
from nbl_export.run_directory import MOMENTS_FILE, RunDirectory

__all__ = ["Shards", "open_shards"]

_MEANING = {
    "model": "are of different models", "text": "are of different calibration texts",
    "context": "have different --context",
    "tokens": "have different numbers of tokens", "windows": "cut the text into different tokens (another tokenizer?)",
    "batches": "cut the text into different batches", "taps": "have different taps (--tap)",
    "products": "were multiplied in different types (--compute-dtype)",
}  # fmt: skip


class Shards:
    """All shards of one calibration, open. Use `open_shards`."""

    def __init__(self, files: Sequence[MomentsFile]) -> None:
        self._files = sorted(files, key=lambda file: file.shard)
        _check_one_calibration(self._files)
        self._facts = self._files[0].facts

    @property
    def count(self) -> int:
        """Tokens of all shards."""
        return sum(int(file.facts["count"]) for file in self._files)

    @property
    def manifest(self) -> dict[str, Any]:
        """Facts of the whole calibration for a run directory's manifest."""
        run = dict(self._facts["run"])
        options = JobOptions.from_json(run["options"])
        return {**run, "options": dataclasses.replace(options, shard=None).to_json()}

    def key(self, options: Sequence[str]) -> tuple[Any, ...]:
        """Parts of the stage key of the same calibration without shards."""
        identity, chosen = self._facts["identity"], self.manifest["options"]
        return [identity["model"], identity["text"]], {name: chosen[name] for name in options}, []

    def write(self, path: Path, progress: Callable[[int, int], None]) -> None:
        """Write the moments file of the whole calibration."""
        first = self._files[0]
        batches = self._facts["identity"]["batches"]
        facts = {
            **{name: self._facts[name] for name in ("identity", "run")},
            "count": self.count, "shard": [1, 1], "batches": batches, "done": batches,
        }  # fmt: skip
        with MomentsWriter(path, facts, first.num_layers, first.taps, first.sizes) as out:
            for i in range(first.num_layers):
                out.write({tap: self._layer(i, tap) for tap in first.taps})
                progress(i + 1, first.num_layers)

    def _layer(self, index: int, tap: str) -> Sums:
        total = self._files[0].sums(index, tap)
        for file in self._files[1:]:
            total = total.merge(file.sums(index, tap))
        return total


@contextlib.contextmanager
def open_shards(inputs: Sequence[Path]) -> Iterator[Shards]:
    """Open run directories or moments files, and check that they belong together.

    Raises:
        CorruptError: a file is damaged or unfinished.
        NblError: the files are not all the shards of one calibration.
    """
    with contextlib.ExitStack() as stack:
        files = []
        for path in map(_moments_of, inputs):
            file = stack.enter_context(open_moments(path))
            _check_file(file)
            files.append(file)
        yield Shards(files)


def _moments_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    run = RunDirectory.peek(path)
    if "calibrate" not in run.stages:
        raise NblError(
            f"{path} holds no finished calibration; nbl-export calibrate --shard I/N --output {path} makes one"
        )
    run.check("calibrate")
    return path / MOMENTS_FILE


def _check_file(file: MomentsFile) -> None:
    missing = {"identity", "run", "count", "shard"} - set(file.facts)
    if missing:
        raise NblError(f"{file.path} does not say what it was collected from; make it again with nbl-export calibrate")
    if not file.is_complete:
        raise CorruptError(f"{file.path} is of a calibration that was not finished; run its calibrate again")
    file.check()


def _check_one_calibration(files: Sequence[MomentsFile]) -> None:
    first = files[0]
    for file in files[1:]:
        for name, meaning in _MEANING.items():
            if file.facts["identity"].get(name) != first.facts["identity"].get(name):
                raise NblError(f"{first.path} and {file.path} {meaning} and cannot be merged")
        if file.shard[1] != first.shard[1]:
            raise NblError(
                f"{first.path} is a shard of {first.shard[1]}, {file.path} one of {file.shard[1]}; "
                "shards of one calibration have the same n"
            )
    by_number: dict[int, Path] = {}
    for file in files:
        number = file.shard[0]
        if number in by_number:
            raise NblError(f"shard {number} of {first.shard[1]} is given twice: {by_number[number]} and {file.path}")
        by_number[number] = file.path
    missing = [str(number) for number in range(1, first.shard[1] + 1) if number not in by_number]
    if missing:
        kind = "shards" if len(missing) > 1 else "shard"
        raise NblError(
            f"{kind} {', '.join(missing)} of {first.shard[1]} missing; collect with --shard I/{first.shard[1]}"
        )
