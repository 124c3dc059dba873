"""A job whose run directory is a manifest alone, and jobs that end after a stage."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from nbl_export.options.options import JobOptions
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.inputs import Lazy
from nbl_export.run import pipeline
from nbl_export.run.job import Job
from nbl_export.run.progress import Ui
from nbl_export.run.settled import of_run
from nbl_export.run_directory import RunDirectory

__all__ = ["TEXT", "job_of", "opened", "until"]

_PARTS = ("windows", "held_out", "training", "validation", "selection", "test")
_ITEMS = tuple(f"retrieval.{use}.pairs" for use in ("selection", "validation"))
TEXT: dict[str, Any] = {
    "name": "a text", "second": "another text",
    "parts": {part: part for part in (*_PARTS, *(f"second.{part}" for part in _PARTS[3:]), *_ITEMS)},
}  # fmt: skip
_SPEC = DecoderSpec("llama", 3, 64, 4, 2, 16, 384, 512)


@contextlib.contextmanager
def until(stage: str) -> Iterator[None]:
    """Main jobs end after this stage: for tests that read nothing of the later stages."""
    work: Any = pipeline._work

    def stopping(*given: Any) -> None:
        work(*given[:-1], stage)

    with mock.patch.object(pipeline, "_work", stopping):
        yield


def job_of(directory: Path, options: dict[str, Any], manifest: dict[str, Any] | None = None, asked: Any = ()) -> Job:
    """The job of a torch model with three layers.

    Args:
        manifest: values that replace those of its facts.
    """
    run, given = RunDirectory(directory), JobOptions("m", **options)
    run.manifest = {
        "model": {"fingerprint": "model"}, "calibration": {}, "sources": [], "quantized": {"fingerprint": "codes"},
        "decoder": dataclasses.asdict(_SPEC), "places": {}, "num_layers": 3, "replaced_layers": [1],
        "kinds": ["linear"], "tap": "residual", "select": "cca", "scores": [], "options": given.to_json(),
        "stages": {"calibrate": {"key": "", "files": "moments"}}, "text": TEXT, **(manifest or {}),
    }  # fmt: skip
    job = of_run(run, given, Ui(quiet=True))
    source: Any = SimpleNamespace(gguf=None, fingerprint=job.fingerprint, directory=directory)
    job.source = Lazy(None, lambda: source)
    job.evaluation = asked
    job.__dict__["shortage"] = Lazy(None, lambda: "")
    return job


def opened(run: Path, **changes: Any) -> Job:
    """The job of a finished run."""
    found = RunDirectory.peek(run)
    options = JobOptions.from_json({**found.manifest["options"], **changes})
    return of_run(found, options, Ui(quiet=True))
