"""`nbl-export accept DIR` on the machine that will run an engine.

    this process ── Child ─► the engine's runner ─► verify.on_target      one process for each decoder
         ▲                                             │
         └────── the fields of a CheckResult ... ◄─────┘

    DIR/acceptance.json      written after each decoder; an interrupted acceptance goes on with the next one

A crash is a failed check with a sentence.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nbl_export.child import Child, Write
from nbl_export.errors import NblError, ParityError
from nbl_export.files import read_json, versions, write_json
from nbl_export.measure.benchmark import machine
from nbl_export.measure.footprint import OpenRunner
from nbl_export.records.from_json import read_record
from nbl_export.records.results import YES_NO, CheckResult, status_of
from nbl_export.run.deployed import locate
from nbl_export.run.progress import Ui
from nbl_export.run_directory import ACCEPTANCE_FILE, ACCEPTANCE_JSON, DECODERS, PACKAGES, RunDirectory
from nbl_export.targets import load_engine
from nbl_export.verify.on_target import checks, load
from nbl_export.version import __version__

__all__ = ["accept", "examine", "examined", "refuse_failed"]

_PACKAGES = ("nbl-export", *PACKAGES, "cuda-python", "cuda-bindings", "tensorrt-cu13", "tensorrt-cu12",
             "tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "onnxruntime-genai-cuda")  # fmt: skip
_LONGEST = 500  # characters of a message
_DONE = ""
_STAGES = ("decoder", "rewrite", "verify", "build")  # that acceptance follows from


def accept(directory: Path, ui: Ui, *, force: bool = False, open_runner: OpenRunner | None = None) -> dict[str, Any]:
    """Check both decoders and return the value of acceptance.json.

    Args:
        force: accept a run that failed verification.
        open_runner: opens a decoder in another process; None is the engine of the run.

    Raises:
        NblError: the directory is no finished run for an engine of a GPU, or lacks acceptance-values.json; or the
            engine cannot run here.
        CorruptError: a file is missing or has changed since it was written.
    """
    run = RunDirectory.existing(directory)
    options = run.options
    if not load_engine(options.engine, options.provider).capabilities.needs_target_gpu:
        raise NblError(
            f"{directory} is for an engine of a CPU, which verification has run; accept is for engines of a GPU: trt, "
            "trt-rtx, and --provider cuda"
        )
    places = {subject: locate(directory, name, force=force) for subject, name in DECODERS.items()}
    values = directory / ACCEPTANCE_FILE
    if ACCEPTANCE_FILE in run.stages.get("verify", {}).get("files", {}):
        run.check("verify")
    if (noted := load(values).precision) != options.precision:
        raise NblError(f"{values} is of {noted}, the run of {options.precision}; verify again where it was made")
    noted_at = directory / ACCEPTANCE_JSON
    found = _facts(run)
    found["checks"] = _finished(noted_at, found)
    for subject, place in places.items():
        if any(check["subject"] == subject for check in found["checks"]):
            continue
        ui.say(f"  checking {subject}")
        try:
            found["checks"] += examined(
                open_runner or place.open, subject, place.path, values, _yardstick(found["checks"])
            )
        except NblError as error:
            raise NblError(f"{directory} cannot be accepted here: {error}") from error
        write_json(noted_at, found)
    found["status"] = status_of(found["checks"])
    write_json(noted_at, found)
    return found


def _facts(run: RunDirectory) -> dict[str, Any]:
    """acceptance.json before the first check."""
    model = run.manifest["model"]
    provider = run.options.provider
    return {
        "schema": 3,
        "status": "incomplete",
        "model": str(model.get("title") or model["name"]),
        "engine": run.options.engine if provider == "cpu" else f"{run.options.engine} --provider {provider}",
        "precision": run.options.precision,
        "replaced_layers": run.manifest.get("replaced_layers", []),
        "machine": machine(gpu=True),
        "versions": {"nbl-export": __version__, **versions(_PACKAGES)},
        "stages": {name: run.stages[name]["key"] for name in _STAGES if name in run.stages},
        "checks": [],
    }


def _finished(path: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks of an interrupted acceptance of the same decoders on the same machine."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = read_json(path)
        if {**found, "checks": []} == facts:
            return [dataclasses.asdict(read_record(CheckResult, check)) for check in found["checks"]]
    return []


def _yardstick(found: Sequence[Mapping[str, Any]]) -> float | None:
    """The largest finite difference of the original's logits; None if there is none."""
    own = [c["value"] for c in found if c["check"] == "original" and c["tolerance"] != YES_NO]
    return max(filter(None, own), default=None)


def refuse_failed(found: dict[str, Any], directory: Path) -> None:
    """Raise if a check failed.

    Raises:
        ParityError: the first check that failed.
    """
    for check in found["checks"]:
        if not check["passed"]:
            raise ParityError(
                f"check {check['check']} of {check['subject']} failed: {check['metric']}: {check['detail']}. See "
                f"{directory / ACCEPTANCE_JSON}"
            )


# -- one decoder, in a process of its own ------------------------------------------------------------------------


def examined(
    open_runner: OpenRunner, subject: str, directory: Path, values: Path, yardstick: float | None = None
) -> list[dict[str, Any]]:
    """Check one decoder in a process of its own; returns the fields of each `CheckResult`.

    Args:
        directory: of the deployed decoder.
        values: acceptance-values.json.
        yardstick: see `verify.on_target.checks`.

    Raises:
        NblError: the engine cannot run here.
    """
    results = []
    with Child(examine, open_runner, subject, directory, values, yardstick) as child:
        while isinstance(answer := child.answer(), dict):
            results.append(answer)
        if answer is None:
            results.append(_broken(subject, f"the process {child.ending()} after {len(results)} results"))
        elif answer != _DONE:
            raise NblError(answer)
    return results


def examine(
    write: Write, open_runner: OpenRunner, subject: str, directory: Path, values: Path, yardstick: float | None = None
) -> None:
    """Send the fields of each result of a decoder, then `_DONE`, or why the engine cannot run. No error gets out."""
    is_open = False
    try:
        with open_runner(directory, None) as runner:
            is_open = True
            for result in checks(runner, subject, load(values), yardstick):
                write(dataclasses.asdict(result))
    except Exception as error:  # a library of the GPU's may raise anything
        text = " ".join(str(error).split())[:_LONGEST]
        if isinstance(error, NblError) and not is_open:
            return write(text)
        kind = "" if isinstance(error, NblError) else f"{type(error).__name__}: "
        write(_broken(subject, f"{kind}{text}"))
    return write(_DONE)


def _broken(subject: str, reason: str) -> dict[str, Any]:
    metric = "the checks come to their end"
    return dataclasses.asdict(CheckResult(subject, subject, metric, 1.0, YES_NO, False, reason))
