"""What all stages share: declared inputs, the context of a stage, and which earlier stages it reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from nbl_export.files import key_of
from nbl_export.methods.base import Mixer
from nbl_export.model import processes
from nbl_export.records.inputs import identity_of
from nbl_export.records.plan import Plan
from nbl_export.records.results import status_of
from nbl_export.run.job import Job
from nbl_export.run.progress import Ui
from nbl_export.run_directory import MAPS_FILE, VERIFY_FILE, RunDirectory

__all__ = ["Inputs", "Skipped", "Stage", "StageContext", "shared_batches"]

_SECONDS = 30.0  # least time between two partial files,
_SHARE = 50.0  # and at least this many times the seconds of writing one

Inputs = TypeVar("Inputs")


@dataclass(frozen=True)
class Skipped:
    """In place of inputs: the stage does not run. An empty reason is not told to the user."""

    reason: str = ""


@dataclass(frozen=True)
class StageContext:
    """Where a stage works: the run directory with what earlier stages left, and the user who watches.

    readers: names of the stages that read this one, directly or indirectly.
    """

    run: RunDirectory
    ui: Ui
    readers: tuple[str, ...] = ()

    @property
    def plan(self) -> Plan:
        return self.run.plan

    def maps(self) -> dict[int, Mixer]:
        """The maps of the plan's layers."""
        from nbl_export.methods.maps_file import load_maps

        return load_maps(self.run.path / MAPS_FILE, self.plan.layers, self.run.decoder.hidden_size)

    @property
    def verdict(self) -> str:
        """The status of the run: that of its verification, if there is one (`records.results.status_of`)."""
        if "verify" not in self.run.stages:
            return str(self.run.manifest["status"])
        return status_of(self.run.read_json(VERIFY_FILE)["checks"])

    @property
    def passed(self) -> bool:
        return bool(self.run.read_json(VERIFY_FILE)["passed"])


@dataclass(frozen=True)
class Stage(Generic[Inputs]):
    """A stage runs if its key changes. The key covers its inputs and the keys of the earlier stages that it reads.

    Attributes:
        reads: earlier stages whose files or facts it reads.
        declare: makes the inputs, a frozen dataclass, from the job. The stage itself sees no option.
        run: writes files to a directory and returns facts for the manifest.
        by_engine: an engine works in it, and torch does not.
        shared: several processes share its work (`model.processes`).
        by_part: whoever reads its file has the hash of a part of it among its inputs. So no key has the key of this
            stage, and another file makes nothing stale by itself.
    """

    name: str
    title: str
    reads: tuple[str, ...]
    declare: Callable[[Job], Inputs | Skipped]
    run: Callable[[Inputs, StageContext, Path], dict[str, Any]]
    by_engine: bool = False
    shared: bool = False
    by_part: bool = False

    def declared(self, job: Job) -> tuple[Inputs, str] | Skipped:
        """Its inputs, and its key, which the keys of its readers will have."""
        inputs = self.declare(job)
        if isinstance(inputs, Skipped):
            return inputs
        key = key_of(self.name, identity_of(inputs), [job.keys[name] for name in self.reads if name in job.keys])
        if not self.by_part:
            job.keys[self.name] = key
        return inputs, key


def shared_batches(
    parts: Sequence[Any], done: int, progress: Callable[[int, int], None], keep: Callable[[int], None]
) -> Iterator[Any]:
    """The batches that this process runs, one in each turn of all processes; None in a turn without one.

    Args:
        parts: all batches, of which `done` are done.
        keep: writes a partial file of so many batches; all processes call it, now and then.
    """
    total = sum(part.numel() for part in parts)
    due = time.monotonic() + _SECONDS
    for first in range(done, len(parts), processes.count()):
        end = min(first + processes.count(), len(parts))
        mine = next(iter(processes.rank_slice(end - first)), None)
        yield None if mine is None else parts[first + mine]
        progress(sum(part.numel() for part in parts[:end]), total)
        if processes.broadcast_str("due" * (time.monotonic() >= due)):
            begun = time.monotonic()
            keep(end)
            due = time.monotonic() + max(_SECONDS, _SHARE * (time.monotonic() - begun))
