"""Runs of a job: which stages in which directory, what is reused, and what happens when the proof fails."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nbl_export import distributed
from nbl_export.artifacts import RunDirectory, key_of, refuse_foreign
from nbl_export.errors import NblError, ParityError
from nbl_export.goals import changed_options
from nbl_export.graph_source import adapted, refuse_changes
from nbl_export.job import Job, check_options, located
from nbl_export.nbl_checkpoint import GIVEN_FIT, NO_ORIGINAL
from nbl_export.preflight import preflight, require_engine
from nbl_export.progress import Ui
from nbl_export.records import JobOptions
from nbl_export.stages import STAGES, Stage, passed, readers

__all__ = ["run_calibration", "run_job", "run_merge", "run_stages", "run_sweep"]


def run_job(options: JobOptions, output: Path, ui: Ui, *, force: bool = False) -> Path | None:
    """Checkpoint in, verified and measured NBL decoder out. Resumes what is there; `force` starts over.

    None on processes of torchrun that only help.

    Raises:
        NblError: anything the user can put right, before anything is computed where it can be known by then.
        ParityError: the graph does not compute what the torch model computes.
    """
    with distributed.led(distributed.current()) as leads:
        if not leads:
            return None
        options = adapted(options)
        preflight(options)
        require_engine(options)
        _work(options, output, ui, force, "report")
        return output


def run_calibration(model: str, given: dict[str, Any], output: Path, ui: Ui, *, force: bool = False) -> Path | None:
    """The first stage by itself, of a new run or of one whose other options stay as they are recorded.

    None on processes of torchrun that only help.
    """
    with distributed.led(distributed.current()) as leads:
        return _calibration(model, given, output, ui, force) if leads else None


def _calibration(model: str, given: dict[str, Any], output: Path, ui: Ui, force: bool) -> Path:
    refuse_foreign(output)
    recorded = {} if force else RunDirectory.peek(output).manifest.get("options", {})
    options = adapted(dataclasses.replace(JobOptions.from_json({**recorded, "model": model, "shard": None}), **given))
    preflight(options)
    _work(options, output, ui, force, "calibrate")
    return output


def run_merge(inputs: Sequence[Path], output: Path, ui: Ui, *, force: bool = False) -> Path:
    """All shards of a calibration -> a run directory whose calibrate stage is finished.

    Raises:
        NblError: the inputs are not all the shards of one calibration, or `output` holds another run.
    """
    from nbl_export import merge

    refuse_foreign(output)
    if any(output.absolute() in (path.absolute(), path.absolute().parent) for path in inputs):
        raise NblError(f"{output} is one of the shards; use another --output")
    with merge.open_shards(inputs) as shards, RunDirectory.open_run(output, create=True, force=force) as run:
        known = bool(run.manifest)
        if not known:
            run.note(**shards.manifest)
        job = Job(JobOptions.from_json(shards.manifest["options"]), run, ui)
        key = key_of("calibrate", *shards.key(STAGES[0].options))
        if known and run.is_done("calibrate", key):
            ui.say("merge: reused")
            return output
        if known:
            raise NblError(f"{output} holds another run; use another --output, or start over with --force")
        job.note_options(job.options)
        run.save()
        with ui.task("merging") as progress, run.scratch() as scratch:
            started = time.monotonic()
            shards.write(scratch / "moments.safetensors", progress)
            run.finish("calibrate", key, scratch, time.monotonic() - started, readers("calibrate"))
        ui.say(f"merge: {len(inputs)} shards, {shards.count} tokens")
    return output


def _work(options: JobOptions, output: Path, ui: Ui, force: bool, until: str) -> None:
    refuse_foreign(output)
    job = Job(options, RunDirectory(output) if force else RunDirectory.peek(output), ui)
    job.check_inputs()  # before anything is written, or, with force, removed
    if until == "calibrate" and job.options.fit == GIVEN_FIT:
        raise NblError(f"nothing to calibrate here: {NO_ORIGINAL}; give the original model")
    with RunDirectory.open_run(output, create=True, force=force) as job.run:
        job.identify()
        _advance(job, until)


def run_stages(
    output: Path,
    until: str,
    ui: Ui,
    *,
    changes: dict[str, Any] | None = None,
    force: bool = False,
    needs: str = "",
    sweep_to: int | None = None,
    evaluation: Any = None,
) -> RunDirectory:
    """Bring an existing run directory up to a stage, with changed options if any.

    Args:
        force: go on although verification failed.
        needs: a stage that must not be left out.
        sweep_to: the most layers of a sweep.
        evaluation: what the stage `eval` is to measure (`evaluation_job.Prepared`); it is left out without.
    """
    with RunDirectory.open_run(output, create=False) as run:
        recorded = JobOptions.from_json(run.manifest["options"])
        options = changed_options(recorded, changes or {})
        refuse_changes(recorded, options)
        preflight(options)
        if changes and "engine" in changes:
            require_engine(options)
        if options.shard and until != "calibrate":
            raise NblError(
                f"{output} holds shard {options.shard} of a calibration; put all of them together first: "
                "nbl-export merge A B ... --output C"
            )
        job = Job(located(options, run), run, ui, evaluation)
        check_options(options, job.spec)
        job.sweep_to = sweep_to
        if options != recorded:
            job.note_options(options)
        if options.quantized_model != recorded.quantized_model:
            job.note_quantized()
        _advance(job, until, ignore_failure=force, needs=needs)
        return run


def run_sweep(output: Path, ui: Ui, changes: dict[str, Any], max_layers: int | None) -> RunDirectory:
    """Measure quality against speed for every number of layers; a report that is there already then shows it.

    Raises:
        NblError: as many layers as the model has, or more.
    """
    known = RunDirectory.peek(output)
    layers = int(known.manifest.get("num_layers", 2))
    if max_layers is not None and max_layers >= layers:
        raise NblError(f"--max-layers {max_layers}: the model has {layers} attention layers and one stays")
    reported = "report" in known.stages
    run = run_stages(
        output, "sweep", ui, changes=changes, needs="sweep", sweep_to=layers // 2 if max_layers is None else max_layers
    )
    if reported and "verify" in run.stages and "report" not in run.stages:
        run = run_stages(output, "report", ui)
    return run


def _advance(job: Job, until: str, *, ignore_failure: bool = False, needs: str = "") -> None:
    names = [stage.name for stage in STAGES]
    keys: dict[str, str] = {}
    for stage in STAGES[: names.index(until) + 1]:
        reason = stage.skip(job)
        if reason is not None:
            if stage.name == needs:
                raise NblError(f"nothing to {stage.title} here: {reason or 'the engine compiles nothing'}")
            if reason:
                job.ui.say(f"{stage.title}: left out, {reason}")
            continue
        keys[stage.name] = _key(job, stage, keys)
        if _reusable(job, stage, keys[stage.name], ignore_failure):
            job.ui.say(f"{stage.title}: reused")
        else:
            job.ui.say(f"{stage.title} ...")
            started = time.monotonic()
            with job.run.scratch() as scratch:
                facts = stage.run(job, scratch)
                seconds = time.monotonic() - started
                job.run.finish(stage.name, keys[stage.name], scratch, seconds, readers(stage.name), **facts)
            job.ui.say(f"{stage.title}: done in {seconds:.1f} s")
        job.run.partial(stage.name).unlink(missing_ok=True)
        if stage.name == "verify" and not ignore_failure:
            _refuse_failed(job)
    job.run.save()


def _reusable(job: Job, stage: Stage, key: str, ignore_failure: bool) -> bool:
    """Finished from the same inputs; a failed verification is done again, rather than believed, unless ignored."""
    if not job.run.is_done(stage.name, key):
        return False
    return stage.name != "verify" or ignore_failure or passed(job)


def _key(job: Job, stage: Stage, keys: dict[str, str]) -> str:
    chosen = {name: getattr(job.options, name) for name in stage.options}
    return key_of(stage.name, stage.identity(job), chosen, [keys[name] for name in stage.reads if name in keys])


def _refuse_failed(job: Job) -> None:
    result = job.run.read_json("verify.json")
    if result["passed"]:
        return
    _report_failure(job, result)
    failed = next(r for r in result["rungs"] if not r["passed"])
    seen = "not finite" if failed["value"] is None else f"{failed['value']:.3g} seen"
    raise ParityError(
        f"verification failed in {job.run.path}: rung {failed['rung']} ({failed['subject']}, {failed['metric']}"
        f"{', ' + failed['detail'] if failed['detail'] else ''}): {seen}, {failed['tolerance']:.3g} allowed; "
        f"{_EXPORTERS_FAULT if failed['rung'] == 'b' else ''}"
        "the directory is kept for inspection (verify.json, report.html)"
    )


_EXPORTERS_FAULT = (
    "the graph is wrong as it came from the exporter, before any layer was replaced: try another --decoder-source or "
    "--precision; "
)


def _report_failure(job: Job, verify: dict[str, Any]) -> None:
    """A report that says failed, without speed."""
    from nbl_export import report

    with job.run.scratch() as scratch:
        report.render(job.run.manifest, verify, None, scratch)
        job.run.finish("report", key_of("failed"), scratch, 0.0, (), status="failed")
