"""`nbl-export accept DIR` on the machine that will run an engine.

    this process ── Child ─► the engine's runner ─► verify.on_target      one process for each decoder
         ▲                                             │
         └────── ["result", CheckResult] ... ◄──────────┘

    DIR/acceptance.json      written after each result

A crash, or no answer in time, is a failed check with a sentence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nbl_export.child import Child, Write
from nbl_export.errors import AcceptanceError, NblError
from nbl_export.files import versions, write_json
from nbl_export.measure.benchmark import machine
from nbl_export.records.results import YES_NO, CheckResult
from nbl_export.run.deployed import locate
from nbl_export.run.progress import Ui
from nbl_export.run_directory import ACCEPTANCE_FILE, ACCEPTANCE_JSON, DECODERS, PACKAGES, RunDirectory
from nbl_export.targets import load_engine
from nbl_export.targets.base import Target
from nbl_export.verify.on_target import Doing, Expected, checks, load
from nbl_export.version import __version__

__all__ = [
    "CANNOT_RUN",
    "FINISHED",
    "MESSAGE",
    "RESULT",
    "Event",
    "Find",
    "accept",
    "examine",
    "examined",
    "refuse_failed",
]

_PACKAGES = ("nbl-export", *PACKAGES, "cuda-python", "cuda-bindings", "tensorrt-cu13", "tensorrt-cu12",
             "tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "onnxruntime-genai-cuda")  # fmt: skip

LIMIT_SECONDS = 1800.0  # from one answer of the process to the next; a GPU that hangs never answers
RESULT = "result"
CANNOT_RUN = "cannot run"
MESSAGE = "message"
DOING = "doing"
FINISHED = "finished"
_LISTS = {RESULT: "checks", MESSAGE: "messages"}  # of acceptance.json
_LONGEST = 500  # characters of a message

Event = list[Any]  # its kind, and its value
Find = Callable[[], Target]  # finds the engine; a function that another process can find by its name


def accept(
    directory: Path,
    ui: Ui,
    *,
    force: bool = False,
    find: Find | None = None,
    look: Callable[..., Generator[Event, None, None]] | None = None,
) -> dict[str, Any]:
    """Check both decoders and return the value of acceptance.json.

    Args:
        force: accept a run that failed verification.
        find: finds the engine; None is the engine of the run.
        look: checks one decoder; None is `examined`.

    Raises:
        NblError: the directory is no finished run for an engine of a GPU, or lacks acceptance.safetensors.
        CorruptError: a file is missing or has changed since it was written.
    """
    run = RunDirectory.existing(directory)
    engine = run.options.engine
    provider = run.options.provider
    precision = run.options.precision
    if not load_engine(engine, provider).capabilities.cross:
        raise NblError(
            f"{directory} is for an engine of a CPU, which verification has run; accept is for engines of a GPU: trt, "
            "trt-rtx, and --provider cuda"
        )
    places = {subject: locate(directory, name, force=force).path for subject, name in DECODERS.items()}
    values = directory / ACCEPTANCE_FILE
    if ACCEPTANCE_FILE in run.stages.get("verify", {}).get("files", {}):
        run.check("verify")
    if (noted := load(values).precision) != precision:
        raise NblError(f"{values} is of {noted}, the run of {precision}; verify again where it was made")
    found_by = find or functools.partial(load_engine, engine, provider)
    found = _blank(run, engine if provider == "cpu" else f"{engine} --provider {provider}")
    for subject, place in places.items():
        ui.say(f"  checking {subject}")
        yardstick = _yardstick(found["checks"])
        with contextlib.closing((look or examined)(found_by, subject, place, values, yardstick)) as events:
            for kind, *value in events:
                if kind in _LISTS:
                    found[_LISTS[kind]] += value
                elif kind == CANNOT_RUN:
                    found["cannot_run"] = value[0]
                write_json(directory / ACCEPTANCE_JSON, found)
        if found["cannot_run"]:
            break
    passed = all(check["passed"] for check in found["checks"])
    found["status"] = "cannot run" if found["cannot_run"] else "passed" if passed else "failed"
    write_json(directory / ACCEPTANCE_JSON, found)
    return found


def _yardstick(results: Sequence[Mapping[str, Any]]) -> float | None:
    """The largest finite difference of the original's logits so far; None if there is none."""
    own = [r["value"] for r in results if r["check"] == "original" and "logit difference" in r["metric"]]
    return max((value for value in own if value is not None), default=None)


def _blank(run: RunDirectory, engine: str) -> dict[str, Any]:
    """acceptance.json before the first check."""
    model = run.manifest["model"]
    return {
        "schema": 2,
        "status": "incomplete",
        "model": str(model.get("title") or model["name"]),
        "engine": engine,
        "precision": run.options.precision,
        "replaced_layers": run.manifest.get("replaced_layers", []),
        "machine": machine(gpu=True),
        "versions": {"nbl-export": __version__, **versions(_PACKAGES)},
        "cannot_run": "",
        "checks": [],
        "messages": [],
    }


def refuse_failed(found: dict[str, Any], directory: Path) -> None:
    """Raise if a check failed or if nothing can run.

    Raises:
        AcceptanceError: the first check that failed. NblError: this machine cannot run the engine.
    """
    if found["cannot_run"]:
        raise NblError(f"{directory} cannot be accepted here: {found['cannot_run']}")
    for check in found["checks"]:
        if not check["passed"]:
            raise AcceptanceError(
                f"check {check['check']} of {check['subject']} failed: {check['metric']}: {check['detail']}. See "
                f"{directory / ACCEPTANCE_JSON}"
            )


# -- one decoder, in a process of its own ------------------------------------------------------------------------


def examined(
    find: Find,
    subject: str,
    directory: Path,
    values: Path,
    yardstick: float | None = None,
    seconds: float = LIMIT_SECONDS,
) -> Generator[Event, None, None]:
    """Check one decoder in a process of its own, and yield its events.

    Args:
        directory: of the deployed decoder.
        values: acceptance.safetensors.
        yardstick: see `verify.on_target.checks`.
        seconds: the process is ended if it does not answer for so long.

    Yields:
        [RESULT, the fields of a CheckResult], [MESSAGE, text of a library], [CANNOT_RUN, reason], at last [FINISHED].
    """
    check = "structure"
    doing = "starting"
    with Child(examine, find, subject, directory, values, yardstick) as child:
        while True:
            try:
                event = child.answer(seconds)
            except TimeoutError:
                yield _broken(check, subject, f"no answer within {seconds:.0f} s: it hung while {doing}")
                event = [FINISHED]
            if event is None:
                yield _broken(check, subject, f"the process {child.ending()} while {doing}")
                event = [FINISHED]
            if event[0] == DOING:
                _, check, doing = event
            else:
                yield event
            if event[0] == FINISHED:
                return


def examine(
    write: Write, find: Find, subject: str, directory: Path, values: Path, yardstick: float | None = None
) -> None:
    """Check one decoder in this process, and send the events that `examined` yields. No error gets out."""
    now = ["structure", "starting"]

    def doing(check: str, what: str) -> None:
        now[:] = check, what
        write([DOING, check, what])

    logging.getLogger().addHandler(_Sender(write))
    try:
        _examine(write, find, subject, directory, load(values), doing, yardstick)
    except Exception as error:  # a library of the GPU's may raise anything
        text = " ".join(str(error).split())[:_LONGEST]
        kind = "" if isinstance(error, NblError) else f"{type(error).__name__}: "
        write(_broken(now[0], subject, f"{kind}{text} (while {now[1]})"))
    write([FINISHED])


def _examine(
    write: Write, find: Find, subject: str, directory: Path, expected: Expected, doing: Doing, yardstick: float | None
) -> None:
    doing("structure", "looking for the GPU and the library")
    engine = find()
    found = engine.probe_run()
    if not found.available:
        return write([CANNOT_RUN, found.reason])
    doing("structure", f"opening the decoder {subject}")
    try:
        runner: Any = engine.open_runner(directory, None)
    except NblError as error:  # another version, another GPU, an engine of somebody else, too little memory
        return write([CANNOT_RUN, str(error)])
    with runner:
        write(_event("structure", subject, "the engine fits library and GPU", 0.0, YES_NO, True, found.reason))
        for result in checks(runner, subject, expected, doing, yardstick):
            write([RESULT, dataclasses.asdict(result)])
        doing("structure", f"closing the decoder {subject}")
    return None


class _Sender(logging.Handler):
    """Sends warnings of the libraries and of this project to the record."""

    def __init__(self, write: Write) -> None:
        super().__init__(logging.WARNING)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        self._write([MESSAGE, " ".join(record.getMessage().split())[:_LONGEST]])


def _event(*result: Any) -> Event:
    """The event of a `CheckResult` with these fields."""
    return [RESULT, dataclasses.asdict(CheckResult(*result))]


def _broken(check: str, subject: str, reason: str) -> Event:
    return _event(check, subject, "the check comes to its end", 1.0, YES_NO, False, reason)
