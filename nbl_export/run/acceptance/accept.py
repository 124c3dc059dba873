"""`nbl-export accept DIR` on the machine that will run an engine: step after step, each in a process of its own.

    DIR/engine/..., DIR/acceptance.safetensors ─► steps ─► DIR/acceptance.{json,html,md}, written after each step

A step that fails names the layer of the stack that is at fault. Steps that rest on it are not reached.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nbl_export import __version__
from nbl_export.acceptance.child import Task, apart
from nbl_export.acceptance.parts import Parts, Target
from nbl_export.acceptance.steps import GENAI_STEPS, STATIC_STEPS, Step
from nbl_export.acceptance.steps.genai import GenaiParts, GenaiTarget
from nbl_export.acceptance.verdict import (
    RUNNER,
    Emit,
    Notes,
    Outcome,
)
from nbl_export.errors import AcceptanceError, NblError
from nbl_export.files import versions, write_json
from nbl_export.measure.benchmark import machine
from nbl_export.measure.rows import spoken_test
from nbl_export.report import acceptance_page
from nbl_export.run.deployed import locate
from nbl_export.run.progress import Ui
from nbl_export.run_directory import (
    ACCEPTANCE_FILE,
    ACCEPTANCE_HTML,
    ACCEPTANCE_JSON,
    ACCEPTANCE_MD,
    PACKAGES,
    REPORT_JSON,
    RunDirectory,
)
from nbl_export.targets.tensorrt.library import LIBRARIES
from nbl_export.targets.tensorrt.record import read_record, refuse_foreign

__all__ = ["accept", "refuse_failed"]

_SUBJECTS = (("original", "original"), ("nbl", "model"))  # subject, and its directory
_PACKAGES = ("nbl-export", *PACKAGES, "cuda-python", "cuda-bindings", "tensorrt-cu13", "tensorrt-cu12",
             "tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "onnxruntime-genai-cuda",
             "onnxruntime-ep-nv-tensorrt-rtx")  # fmt: skip
Run = Callable[[Task, Emit], Outcome]


def accept(
    directory: Path, ui: Ui, *, force: bool = False, run_step: Run | None = None, parts: Any = None
) -> dict[str, Any]:
    """Run all steps and return the value of acceptance.json.

    Args:
        force: accept a run that failed verification.
        run_step: runs the work of one step; None runs it in a process of its own.
        parts: of the stack; None takes the real ones.

    Raises:
        NblError: the directory is no finished run for an engine of a GPU, or lacks acceptance.safetensors.
        CorruptError: a file is missing or has changed since it was written.
    """
    run = RunDirectory.existing(directory)
    target, steps = _target(run, force, parts)
    found = _blank(run, target, steps)
    broken = failed = ""
    for step, record in zip(steps, found["steps"], strict=True):
        if broken or (step.last and failed):
            record |= {"verdict": "not reached", "said": f"the step {broken or failed} has not passed"}
            continue
        _run(step, target, record, run_step or apart, lambda: _write(found, directory))
        ui.say(f"{step.title}: {record['verdict']}, {record['seconds']:.1f} s")
        if record["verdict"] == "cannot run" or (step.needed and record["verdict"] == "failed"):
            broken = step.name
        failed = failed or (step.name if record["verdict"] == "failed" else "")
    found["status"] = _status(found["steps"])
    _write(found, directory)
    return found


def _target(run: RunDirectory, force: bool, parts: Any) -> tuple[Any, tuple[Step, ...]]:
    """The engines of a run, their files checked, and the steps for them."""
    options = run.manifest["options"]
    engine, provider = options["engine"], options.get("provider", "cpu")
    if engine not in LIBRARIES and provider == "cpu":
        raise NblError(
            f"{run.path} is for ONNX Runtime's CPU provider, which verification has run; accept is for engines of a "
            f"GPU: {', '.join(LIBRARIES)}, and --provider cuda or nv-tensorrt-rtx"
        )
    engines = tuple((s, locate(run.path, name, force=force).path) for s, name in _SUBJECTS)
    values = run.path / ACCEPTANCE_FILE
    if engine in LIBRARIES:
        for _, path in engines:
            refuse_foreign(path, read_record(path))
        graphs = {subject: run.path / path.name for subject, path in engines}
        target: Any = Target(run.path, engines, graphs, values, parts or Parts(LIBRARIES[engine]))
    else:
        target = GenaiTarget(run.path, engines, values, parts or GenaiParts(provider))
    if ACCEPTANCE_FILE in run.stages.get("verify", {}).get("files", {}):
        run.check("verify")
    if target.material.precision != options["precision"]:
        raise NblError(
            f"{values} is of {target.material.precision}, the run of {options['precision']}; verify again where it "
            "was made"
        )
    return target, (*(STATIC_STEPS if engine in LIBRARIES else GENAI_STEPS), BENCH)


def bench(target: Any, notes: Notes) -> None:
    """The benchmark of the run, as `nbl-export bench DIR`; the report is written too."""
    from nbl_export.run.pipeline import run_stages

    notes.doing("running the benchmark")
    run = run_stages(target.directory, "report", Ui(), force=True, needs="bench")  # `accept` asked for force
    for row in run.read_json(REPORT_JSON)["rows"]:
        notes.see(f"{spoken_test(row)}, {row['variant']}, tokens/s", row["tokens_per_second_median"])


BENCH = Step("bench", "Benchmark", RUNNER, "See nbl-export bench DIR.", bench, last=True)


def _blank(run: RunDirectory, target: Any, steps: Sequence[Step]) -> dict[str, Any]:
    """acceptance.json before the first step."""
    model = run.manifest["model"]
    return {
        "schema": 1,
        "status": "incomplete",
        "model": str(model.get("title") or model["name"]),
        "engine": _spoken(run.manifest["options"]),
        "precision": target.material.precision,
        "replaced_layers": run.manifest.get("replaced_layers", []),
        "machine": machine(),
        "versions": {"nbl-export": __version__, **versions(_PACKAGES)},
        "steps": [
            {"step": s.name, "title": s.title, "verdict": "not reached", "seconds": None, "said": "", "layer": "",
             "advice": "", "doing": "", "seen": [], "messages": []}
            for s in steps
        ],
    }  # fmt: skip


def _spoken(options: dict[str, Any]) -> str:
    provider = options.get("provider", "cpu")
    return str(options["engine"]) if provider == "cpu" else f"{options['engine']} --provider {provider}"


def _run(step: Step, target: Any, record: dict[str, Any], run_step: Run, write: Callable[[], None]) -> None:
    """Run one step and fill its record, which is written before and after, so that no crash loses it."""

    def heard(kind: str, value: Any) -> None:
        if kind == "doing":
            record["doing"] = value
        else:
            record["seen" if kind == "saw" else "messages"].append(value)

    record["verdict"] = "running"
    write()
    started = time.monotonic()
    found = run_step(Task(functools.partial(step.run, target), step.layer, step.advice), heard)
    record |= {"verdict": found.verdict, "said": found.said, "layer": found.layer, "advice": found.advice,
               "seconds": round(time.monotonic() - started, 3)}  # fmt: skip
    write()


def _status(steps: Sequence[dict[str, Any]]) -> str:
    verdicts = {step["verdict"] for step in steps}
    return next((v for v in ("cannot run", "failed") if v in verdicts), "passed")


def _write(found: dict[str, Any], directory: Path) -> None:
    write_json(directory / ACCEPTANCE_JSON, found)
    acceptance_page.write(found, directory / ACCEPTANCE_HTML, directory / ACCEPTANCE_MD)


def refuse_failed(found: dict[str, Any], directory: Path) -> None:
    """Raise if a step failed or if nothing can run.

    Raises:
        AcceptanceError: the first step that failed, by name. NblError: this machine cannot run the engine.
    """
    for step in found["steps"]:
        if step["verdict"] == "cannot run":
            raise NblError(step["said"])
        if step["verdict"] == "failed":
            raise AcceptanceError(
                f"step {step['step']} failed: {step['said']}. At fault: {step['layer']}. {step['advice']} See "
                f"{directory / ACCEPTANCE_HTML}"
            )
