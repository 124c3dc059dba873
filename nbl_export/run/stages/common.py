"""What all stages share: declared inputs, the place where a stage works, and which earlier stages it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.files import key_of
from nbl_export.mixers.base import Mixer
from nbl_export.records.inputs import identity_of
from nbl_export.records.plan import Plan
from nbl_export.records.results import status_of
from nbl_export.run.progress import Ui
from nbl_export.run.resolve import Resolver
from nbl_export.run_directory import MAPS_FILE, VERIFY_FILE, RunDirectory

__all__ = ["READS", "LeftOut", "Place", "Stage", "readers"]

# Stage -> the earlier stages whose files or facts it reads, in running order.
READS: dict[str, tuple[str, ...]] = {
    "text": (),
    "calibrate": ("text",),
    "plan": ("text", "calibrate"),
    "distill": ("text", "plan"),
    "decoder": (),
    "rewrite": ("plan", "distill", "decoder"),
    "verify": ("text", "rewrite"),
    "eval": ("rewrite",),
    "build": ("rewrite",),
    "bench": ("rewrite", "build"),
    "report": ("plan", "verify", "eval", "build", "bench"),
}


BY_PART = ("text",)  # whoever reads its file has the hash of a part among its inputs, so another file may be the same


def readers(name: str) -> list[str]:
    """Names of the stages that another result of a stage makes stale, directly or indirectly."""
    if name in BY_PART:
        return []
    found = [name]
    for stage, earlier in READS.items():  # in order, so one pass finds all
        if set(earlier) & set(found):
            found.append(stage)
    return found[1:]


@dataclass(frozen=True)
class LeftOut:
    """In place of inputs: the stage does not run. An empty reason is not told to the user."""

    reason: str = ""


@dataclass(frozen=True)
class Place:
    """Where a stage works: the run directory with what earlier stages left, and the user who watches."""

    run: RunDirectory
    ui: Ui

    @property
    def plan(self) -> Plan:
        """The plan that the manifest records."""
        return Plan.from_facts(self.run.manifest)

    def maps(self) -> dict[int, Mixer]:
        """The maps of the plan's layers."""
        from nbl_export.plan.maps_file import load_maps

        return load_maps(self.run.path / MAPS_FILE, self.plan.layers)

    @property
    def verdict(self) -> str:
        """The status of the run: that of its verification (`records.results.status_of`)."""
        return status_of(self.run.read_json(VERIFY_FILE)["checks"])

    @property
    def passed(self) -> bool:
        return bool(self.run.read_json(VERIFY_FILE)["passed"])


@dataclass(frozen=True)
class Stage:
    """A stage runs if its key changes. The key covers its inputs and the keys of the earlier stages that it reads.

    declare: makes the inputs, a frozen dataclass, from the options. The stage itself sees no option.
    run: writes files to a directory and returns facts for the manifest.
    """

    name: str
    title: str
    declare: Callable[[Resolver], Any]
    run: Callable[[Any, Place, Path], dict[str, Any]]

    def key(self, inputs: Any, keys: dict[str, str]) -> str:
        """Fingerprint of the inputs. keys: of the earlier stages that are not left out."""
        earlier = [keys[name] for name in READS[self.name] if name in keys and name not in BY_PART]
        return key_of(self.name, identity_of(inputs), earlier)
