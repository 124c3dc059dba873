"""Runs stages in a run directory, reuses finished stages, and reports a failed verification."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError, ParityError
from nbl_export.files import key_of
from nbl_export.model import processes
from nbl_export.model.device import guarded
from nbl_export.options.options import CHECKPOINT_FIT, NO_ORIGINAL, JobOptions
from nbl_export.options.settle import hub_id
from nbl_export.records.requests import PERPLEXITY, EvalRequest, Subject
from nbl_export.run.deployed import result
from nbl_export.run.estimate import describe_estimate, stages_left
from nbl_export.run.job import Job
from nbl_export.run.progress import Ui
from nbl_export.run.settled import settle_job, settle_run
from nbl_export.run.stages import bench, calibrate, evaluate, graphs, plan, text, verify
from nbl_export.run.stages.common import Inputs, Skipped, Stage, StageContext
from nbl_export.run_directory import REPORT_JSON, VERIFY_FILE, RunDirectory, refuse_foreign
from nbl_export.targets import load_engine

__all__ = ["STAGES", "run_calibration", "run_evaluation", "run_job", "run_stages"]

STAGES: tuple[Stage[Any], ...] = (
    Stage("text", "text", (), text.declare, text.run, by_part=True),
    Stage("calibrate", "calibrate", ("text",), calibrate.declare, calibrate.run, shared=True),
    Stage("plan", "plan", ("text", "calibrate"), plan.declare, plan.run, shared=True),
    Stage("distill", "distill", ("text", "plan"), plan.declare_distill, plan.run_distill, shared=True),
    Stage("decoder", "decoder graph", ("text",), graphs.declare_decoder, graphs.run_decoder),
    Stage("rewrite", "rewrite", ("plan", "distill", "decoder"), graphs.declare_rewrite, graphs.run_rewrite),
    Stage("verify", "verify", ("text", "rewrite"), verify.declare, verify.run),
    Stage("eval", "evaluate", ("rewrite",), evaluate.declare, evaluate.run),
    Stage("build", "build", ("rewrite",), graphs.declare_build, graphs.run_build, by_engine=True),
    Stage("bench", "bench", ("rewrite", "build"), bench.declare, bench.run, by_engine=True),
    Stage("report", "report", ("plan", "verify", "eval", "build", "bench"), lambda _job: (), bench.run_report),
)


def readers(name: str) -> tuple[str, ...]:
    """Names of the stages that another result of a stage makes stale, directly or indirectly."""
    found = [stage.name for stage in STAGES if stage.name == name and not stage.by_part]
    for stage in STAGES:  # in order, so one pass finds all
        if set(stage.reads) & set(found):
            found.append(stage.name)
    return tuple(found[1:])


def run_job(
    asked: Mapping[str, Any], output: Path, ui: Ui, *, force: bool = False, recorded: JobOptions | None = None
) -> Path:
    """Make a verified and measured NBL decoder in `output`. Resumes an existing run; `force` starts over.

    Args:
        asked: the options, by their names, with "model".
        recorded: the options of another run, which those asked for change.

    Raises:
        NblError: an error that the user can correct; raised before any computation if possible.
        ParityError: the NBL graph does not compute what the original graph computes with these layers.
    """
    _work(asked, recorded, output, ui, force, "report")
    _tell(output, ui)
    return output


def _tell(output: Path, ui: Ui) -> None:
    """Say what the run has found, and what to do next."""
    from nbl_export.report.outcome import next_steps, outcome

    if found := result(RunDirectory.existing(output)):
        for name, said in (*outcome(found), *next_steps(found, output)):
            ui.say(f"  {name:<13}{said}")


def run_calibration(model: str, given: dict[str, Any], output: Path, ui: Ui, *, force: bool = False) -> Path:
    """Run only the calibrate stage. An existing run keeps its other recorded options."""
    refuse_foreign(output)
    recorded = {} if force else RunDirectory.peek(output).manifest.get("options", {})
    # A new run has the closed form, whose moments serve every number of layers.
    _work(given, JobOptions.from_json({**recorded, "model": hub_id(model)}), output, ui, force, "calibrate")
    return output


def _work(asked: Mapping[str, Any], recorded: JobOptions | None, output: Path, ui: Ui, force: bool, until: str) -> None:
    """Settle the options, check all inputs, and run the stages up to a stage."""
    runs_engine = until != "calibrate"
    if processes.begin():
        _follow(lambda run, ui: settle_job(asked, recorded, run, ui, runs_engine=runs_engine), output)
    refuse_foreign(output)
    run = RunDirectory(output) if force else RunDirectory.peek(output)
    job = settle_job(asked, recorded, run, ui, runs_engine=runs_engine)
    if until == "calibrate" and job.options.fit == CHECKPOINT_FIT:
        raise NblError(f"nothing to calibrate here: {NO_ORIGINAL}; give the original model")
    left = stages_left(job, STAGES[: _number_of(until)])
    estimated = describe_estimate(job, left, output)
    if STAGES[0] in left:
        job.documents.value  # noqa: B018  read before anything is written or, with force, removed
    with run.opened(create=True, force=force):
        job.begin()
        if estimated:
            ui.say(estimated)
        _advance(job, until)


def run_stages(
    output: Path,
    until: str,
    ui: Ui,
    *,
    changes: dict[str, Any] | None = None,
    force: bool = False,
    needs: str = "",
    asked: tuple[Subject, ...] = (),
) -> RunDirectory:
    """Run the stages of an existing run directory up to a stage, with changed options if any.

    Args:
        force: go on although verification failed.
        needs: a stage that must not be skipped.
        asked: what the stage `eval` measures, which is skipped if there is nothing.
    """
    if processes.begin():
        _follow(lambda run, ui: settle_run(run, changes or {}, ui), output)
    with RunDirectory(output).opened(create=False) as run:
        job = settle_run(run, changes or {}, ui)
        job.evaluation = asked
        _advance(job, until, ignore_failure=force, needs=needs)
        return run


def run_evaluation(
    output: Path, request: EvalRequest, ui: Ui, *, changes: dict[str, Any] | None = None, force: bool = False
) -> RunDirectory:
    """Write figures to DIR/eval.json, and update an existing report. Finished figures are reused.

    Args:
        changes: changed options.

    Raises:
        NblError: an error that the user can correct; raised before any computation if possible.
    """
    run = RunDirectory.existing(output)
    positions = _check_evaluation(run, request)
    reported = "report" in run.stages or ("bench" in run.stages and (run.path / REPORT_JSON).is_file())
    until = "report" if reported else "eval"  # an interrupted evaluation leaves a report that is out of date
    return run_stages(output, until, ui, changes=changes, force=force, asked=_prepare(request, positions, ui))


def _check_evaluation(run: RunDirectory, request: EvalRequest) -> int:
    """Refuse what cannot be measured; returns the most tokens of a window."""
    options = run.options
    decoder = run.decoder
    compiled = load_engine(options.engine).capabilities.static
    if run.manifest.get("exit") and compiled:
        raise NblError(f"{run.path} has predicted KV, which are evaluated in graphs of --engine ort alone")
    positions = options.cache_length(decoder, compiled=compiled)
    asked = [request.window] * bool(request.texts) + [request.long_window(positions)] * bool(request.long_texts)
    if max(asked, default=0) > positions:
        raise NblError(f"--ppl-context {max(asked)} is beyond the model's {positions} positions")
    return positions


def _prepare(request: EvalRequest, positions: int, ui: Ui) -> tuple[Subject, ...]:
    from nbl_export.evaluation import length, tasks
    from nbl_export.text import corpus

    long = request.long_window(positions)
    subjects = []
    tests = [(PERPLEXITY, request.window, pair) for pair in request.texts]
    tests += [(test, long, pair) for pair in request.long_texts for test in length.OF_TEXT]
    for test, context, (name, file) in tests:
        text = corpus.read_text(file)
        data = {"name": text.name, "sha256": text.sha256}
        config = {"context": context, "output_type": test}
        subjects.append(Subject(f"{test}:{name}", text, request.limit, data, config))
    if request.long_texts:
        copying = {"context": long, "output_type": length.COPYING}
        subjects.append(Subject(length.COPYING, None, request.limit, {"name": "random tokens"}, copying))
    if request.tasks:
        with ui.task("tasks"):
            subjects += tasks.load_tasks(request.tasks, request.limit)
    return tuple(subjects)


def _number_of(until: str) -> int:
    """Number of stages up to a stage."""
    return [stage.name for stage in STAGES].index(until) + 1


def _advance(job: Job, until: str, *, ignore_failure: bool = False, needs: str = "") -> None:
    """Run stages in order up to one."""
    run = job.run
    ui = job.ui
    stages = STAGES[: _number_of(until)]
    job.keys.clear()  # of stages that an estimate declared
    for index, stage in enumerate(stages):
        if not any(each.shared for each in stages[index:]):
            processes.end()
        declared = stage.declared(job)
        if isinstance(declared, Skipped):
            if stage.name == needs:
                raise NblError(f"nothing to {stage.title} here: {declared.reason or 'the engine compiles nothing'}")
            if declared.reason:
                ui.say(f"{stage.title}: left out, {declared.reason}")
            continue
        inputs, key = declared
        ctx = StageContext(run, ui, readers(stage.name))
        is_done = run.is_done(stage.name, key)
        if is_done and (stage.name != "verify" or ignore_failure or ctx.passed):  # a failed verification runs again
            ui.say(f"{stage.title}: reused")
        else:
            later = [name for name in readers(stage.name) if _number_of(name) > _number_of(until)]
            if undone := [name for name in later if name in run.stages]:
                ui.say(f"  this undoes {', '.join(undone)} of {run.path}; to keep them, stop now and work on a copy")
            if not stage.by_part:
                job.note()  # of what the result is made
            _run(job, stage, inputs, key, ctx)
        run.partial(stage.name).unlink(missing_ok=True)
        if stage.name == "verify" and not ignore_failure:
            _refuse_failed(ctx)
    processes.end()
    job.note()
    run.save()


def _follow(settled: Callable[[RunDirectory, Ui], Job], output: Path) -> None:
    """In another process than rank 0: take part in the stages that rank 0 begins, and write nothing."""
    job: Job | None = None
    while message := processes.broadcast_str():
        name, expected = message.split()
        ui = Ui(quiet=True)
        run = RunDirectory.existing(output)
        job = job or settled(run, ui)
        job.run.manifest = run.manifest
        declared = [stage.declared(job) for stage in STAGES[: _number_of(name)]][-1]
        if isinstance(declared, Skipped) or declared[1] != expected:
            raise NblError(f"rank {processes.rank()} has other inputs than rank 0; give all the same command and files")
        job.note()
        job.agree()
        with guarded(name):
            STAGES[_number_of(name) - 1].run(declared[0], StageContext(job.run, ui), Path(os.devnull))
    processes.end()


def _run(job: Job, stage: Stage[Inputs], inputs: Inputs, key: str, ctx: StageContext) -> None:
    """Run a stage, and have other processes begin it if they share its work."""
    job.ui.say(f"{stage.title} ...")
    if stage.shared and processes.count() > 1:
        job.ui.say(f"  {processes.count()} processes share the work")
        job.checkpoint.value  # noqa: B018  written before others read it
        processes.broadcast_str(f"{stage.name} {key}")
        job.agree()
    started = time.monotonic()
    with job.run.scratch() as scratch, guarded(stage.title, by_engine=stage.by_engine):
        facts = stage.run(inputs, ctx, scratch)
        seconds = time.monotonic() - started
        job.run.finish(stage.name, key, scratch, seconds, ctx.readers, **facts)
    job.ui.say(f"{stage.title}: done in {seconds:.1f} s")


def _refuse_failed(ctx: StageContext) -> None:
    from nbl_export.report import page

    result = ctx.run.read_json(VERIFY_FILE)
    if result["passed"]:
        return
    with ctx.run.scratch() as scratch:  # a report without speed figures
        page.render(ctx.run.manifest, result, None, scratch)
        ctx.run.finish("report", key_of("failed"), scratch, 0.0, (), status="failed")
    failed = next(r for r in result["checks"] if not r["passed"])
    seen = "not finite" if failed["value"] is None else f"{failed['value']:.3g} seen"
    raise ParityError(
        f"verification failed in {ctx.run.path}: check {failed['check']} ({failed['subject']}, {failed['metric']}"
        f"{', ' + failed['detail'] if failed['detail'] else ''}): {seen}, {failed['tolerance']:.3g} allowed; "
        f"{_EXPORTERS_FAULT if failed['check'] in ('exporter', 'original') else ''}"
        "the directory is kept for inspection (verify.json, report.html)"
    )


_EXPORTERS_FAULT = (
    "the exporter's graph is already wrong, before any layer is replaced: try another --precision or key "
    "decoder_source; "
)
