"""Definitions that all stages share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.measure.cost import CostModel, cost_model
from nbl_export.mixers import layers_below
from nbl_export.mixers.base import Mixer
from nbl_export.records.results import status_of
from nbl_export.run.job import Job
from nbl_export.run_directory import VERIFY_FILE

__all__ = ["VARIANTS", "Stage", "cost_of", "passed", "rows_of", "verdict"]


@dataclass(frozen=True)
class Stage:
    """A stage runs if its key changes. The key covers its options and the earlier stages that it reads.

    identity: other inputs of the stage, as JSON values.
    skip: why the job skips the stage; "" gives no reason to the user, None runs the stage.
    module: in this package, or with a dot in front in `run`, with a function `run(job, out)` that writes files to the
        directory `out` and returns facts for the manifest. The module is imported when the stage runs, because most
        modules need torch or an engine.
    """

    name: str
    title: str
    reads: tuple[str, ...]
    options: tuple[str, ...]
    identity: Callable[[Job], list[Any]] = lambda _: []
    skip: Callable[[Job], str | None] = lambda _: None
    module: str = ""

    def run(self, job: Job, out: Path) -> dict[str, Any]:
        """Run the stage's module."""
        module = importlib.import_module(f".{self.module or self.name}", __package__)
        facts: dict[str, Any] = module.run(job, out)
        return facts


def verdict(job: Job) -> str:
    """The status of the run: that of its verification (`records.results.status_of`)."""
    found = job.run.read_json(VERIFY_FILE)
    return status_of(found["precision"], found["rungs"])


def passed(job: Job) -> bool:
    return bool(job.run.read_json(VERIFY_FILE)["passed"])


VARIANTS = {"original": "original", "nbl": "model"}  # variant -> its directory


def rows_of(job: Job, maps: Mapping[int, Mixer]) -> np.ndarray | None:
    """Rows of the token table, as `model.token_rows` makes them; None if the job has no table.

    The checkpoint is read only if there are rows.
    """
    from nbl_export.model.token_rows import token_rows

    return token_rows(job.checkpoint, maps, job.plan.tap) if job.has_token_table and layers_below(maps) else None


def cost_of(job: Job) -> CostModel:
    """The cost model of the job's shipped graphs."""
    return cost_model(job.options, job.engine.capabilities, job.spec, job.checkpoint, token_table=job.has_token_table)
