"""Runs stages in a run directory, reuses finished stages, and reports a failed verification."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError, ParityError
from nbl_export.files import key_of
from nbl_export.options.options import CHECKPOINT_FIT, NO_ORIGINAL, JobOptions
from nbl_export.options.places import located
from nbl_export.options.settle import settle
from nbl_export.parallel import ranks
from nbl_export.records.requests import Prepared, SweepRequest
from nbl_export.run import torchrun
from nbl_export.run.facts import (
    capabilities_of,
    check_machine,
    facts_of_model,
    facts_of_path,
    facts_of_run,
    read_model,
    require_engine,
)
from nbl_export.run.progress import Ui
from nbl_export.run.resolve import Resolver
from nbl_export.run.stages.common import LeftOut, Place, Stage, readers
from nbl_export.run.stages.table import STAGES
from nbl_export.run_directory import VERIFY_FILE, RunDirectory, refuse_foreign
from nbl_export.targets import ENGINES

__all__ = ["run_calibration", "run_job", "run_stages", "run_sweep"]


def run_job(
    asked: Mapping[str, Any], output: Path, ui: Ui, *, force: bool = False, recorded: JobOptions | None = None
) -> Path | None:
    """Make a verified and measured NBL decoder in `output`. Resumes an existing run; `force` starts over.

    Returns None on helper processes of torchrun.

    Args:
        asked: the options, by their names, with "model".
        recorded: the options of another run, which those asked for change.

    Raises:
        NblError: an error that the user can correct; raised before any computation if possible.
        ParityError: the graph does not compute what the torch model computes.
    """
    with torchrun.led(ranks.current()) as leads:
        if not leads:
            return None
        _work(asked, recorded, output, ui, force, "report")
        return output


def run_calibration(model: str, given: dict[str, Any], output: Path, ui: Ui, *, force: bool = False) -> Path | None:
    """Run only the calibrate stage. An existing run keeps its other recorded options.

    Returns None on helper processes of torchrun.
    """
    with torchrun.led(ranks.current()) as leads:
        return _calibration(model, given, output, ui, force) if leads else None


def _calibration(model: str, given: dict[str, Any], output: Path, ui: Ui, force: bool) -> Path:
    refuse_foreign(output)
    recorded = {} if force else RunDirectory.peek(output).manifest.get("options", {})
    known = JobOptions.from_json({**recorded, "model": model})
    _work(given, known, output, ui, force, "calibrate")
    return output


def _work(asked: Mapping[str, Any], recorded: JobOptions | None, output: Path, ui: Ui, force: bool, until: str) -> None:
    """Settle the options, check all inputs, and run the stages up to a stage."""
    seen = facts_of_path(str(asked.get("model") or (recorded.model if recorded else "")))
    first = settle(asked, capabilities_of, seen, recorded)  # refuses what it can before the model's files are read
    check_machine(first, runs_engine=until != "calibrate")
    refuse_foreign(output)
    run = RunDirectory(output) if force else RunDirectory.peek(output)
    source, decoder = read_model(first.model, run.manifest)
    settled = settle(asked, capabilities_of, facts_of_model(seen, source, decoder), recorded)
    resolver = Resolver(settled, run, ui)
    resolver.source, resolver.read_spec = source, decoder
    resolver.check_inputs()  # before anything is written or, with force, removed
    if until == "calibrate" and settled.fit == CHECKPOINT_FIT:
        raise NblError(f"nothing to calibrate here: {NO_ORIGINAL}; give the original model")
    with RunDirectory.open_run(output, create=True, force=force) as resolver.run:
        resolver.identify()
        _advance(resolver, until)


def run_stages(
    output: Path,
    until: str,
    ui: Ui,
    *,
    changes: dict[str, Any] | None = None,
    force: bool = False,
    needs: str = "",
    asked: SweepRequest | Prepared | None = None,
) -> RunDirectory:
    """Run the stages of an existing run directory up to a stage, with changed options if any.

    Args:
        force: go on although verification failed.
        needs: a stage that must not be skipped.
        asked: the request of the stage `sweep` or `eval`; without a request both stages are skipped.
    """
    with RunDirectory.open_run(output, create=False) as run:
        recorded, changes = JobOptions.from_json(run.manifest["options"]), changes or {}
        _refuse_other_graphs(run, recorded, changes.get("engine"))
        sweeps = isinstance(asked, SweepRequest) or "sweep" in run.stages
        options = settle(changes, capabilities_of, facts_of_run(run.manifest), recorded, sweeps=sweeps)
        if "engine" in changes:
            require_engine(options)
        resolver = Resolver(located(options, run.manifest), run, ui, asked)
        if options != recorded:
            resolver.note_options(options)
        if options.quantized_model != recorded.quantized_model:
            resolver.note_quantized()
        _advance(resolver, until, ignore_failure=force, needs=needs)
        return run


def _refuse_other_graphs(run: RunDirectory, recorded: JobOptions, engine: str | None) -> None:
    """Refuse an engine that does not take the graphs of the run."""
    if engine is None:
        return
    source = capabilities_of(engine).source
    if source == capabilities_of(recorded.engine).source:
        return
    same = [name for name in ENGINES if capabilities_of(name).source == source]
    raise NblError(
        f"{run.path} is a run for --engine {recorded.engine}, whose graphs {engine} does not take; make another run "
        f"with --engine {' or '.join(same)}"
    )


def run_sweep(output: Path, ui: Ui, changes: dict[str, Any], max_layers: int | None) -> RunDirectory:
    """Measure quality against speed for every number of layers, and update an existing report.

    Raises:
        NblError: `max_layers` is not smaller than the model's number of layers.
    """
    known = RunDirectory.peek(output)
    layers = int(known.manifest.get("num_layers", 2))
    if max_layers is not None and max_layers >= layers:
        raise NblError(f"--max-layers {max_layers}: the model has {layers} attention layers and must keep one")
    reported = "report" in known.stages
    run = run_stages(
        output,
        "sweep",
        ui,
        changes=changes,
        needs="sweep",
        asked=SweepRequest(layers // 2 if max_layers is None else max_layers),
    )
    if reported and "verify" in run.stages and "report" not in run.stages:
        run = run_stages(output, "report", ui)
    return run


def _advance(resolver: Resolver, until: str, *, ignore_failure: bool = False, needs: str = "") -> None:
    place, keys = Place(resolver.run, resolver.ui), resolver.keys
    names = [stage.name for stage in STAGES]
    for stage in STAGES[: names.index(until) + 1]:
        inputs = stage.declare(resolver)
        if isinstance(inputs, LeftOut):
            if stage.name == needs:
                raise NblError(f"nothing to {stage.title} here: {inputs.reason or 'the engine compiles nothing'}")
            if inputs.reason:
                place.ui.say(f"{stage.title}: left out, {inputs.reason}")
            continue
        keys[stage.name] = stage.key(inputs, keys)
        if _reusable(place, stage, keys[stage.name], ignore_failure):
            place.ui.say(f"{stage.title}: reused")
        else:
            _run(place, stage, inputs, keys[stage.name])
        place.run.partial(stage.name).unlink(missing_ok=True)
        if stage.name == "verify" and not ignore_failure:
            _refuse_failed(place)
    place.run.save()


def _run(place: Place, stage: Stage, inputs: Any, key: str) -> None:
    place.ui.say(f"{stage.title} ...")
    started = time.monotonic()
    with place.run.scratch() as scratch:
        facts = stage.run(inputs, place, scratch)
        seconds = time.monotonic() - started
        place.run.finish(stage.name, key, scratch, seconds, readers(stage.name), **facts)
    place.ui.say(f"{stage.title}: done in {seconds:.1f} s")


def _reusable(place: Place, stage: Stage, key: str, ignore_failure: bool) -> bool:
    """Whether a stage is finished with the same inputs. A failed verification runs again unless it is ignored."""
    if not place.run.is_done(stage.name, key):
        return False
    return stage.name != "verify" or ignore_failure or place.passed


def _refuse_failed(place: Place) -> None:
    result = place.run.read_json(VERIFY_FILE)
    if result["passed"]:
        return
    _report_failure(place, result)
    failed = next(r for r in result["checks"] if not r["passed"])
    seen = "not finite" if failed["value"] is None else f"{failed['value']:.3g} seen"
    raise ParityError(
        f"verification failed in {place.run.path}: check {failed['check']} ({failed['subject']}, {failed['metric']}"
        f"{', ' + failed['detail'] if failed['detail'] else ''}): {seen}, {failed['tolerance']:.3g} allowed; "
        f"{_EXPORTERS_FAULT if failed['check'] == 'original' else ''}"
        "the directory is kept for inspection (verify.json, report.html)"
    )


_EXPORTERS_FAULT = (
    "the exporter's graph is already wrong, before any layer is replaced: try another --decoder-source or --precision; "
)


def _report_failure(place: Place, verify: dict[str, Any]) -> None:
    """Write a report without speed figures that states the failure."""
    from nbl_export.report import page

    with place.run.scratch() as scratch:
        page.render(place.run.manifest, verify, None, scratch)
        place.run.finish("report", key_of("failed"), scratch, 0.0, (), status="failed")
