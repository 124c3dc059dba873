"""The main job, readable as a list: each stage, what it depends on, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export import __version__
from nbl_export.artifacts import RunDirectory, file_sha256, key_of, refuse_foreign, versions, write_json
from nbl_export.engines import load_engine
from nbl_export.errors import NblError, ParityError, UsageError
from nbl_export.goals import GOALS, changed_options, check_request, goal_inputs
from nbl_export.job import Job, check_options, chunk_of, engine_of, located
from nbl_export.progress import Ui
from nbl_export.records import JobOptions

__all__ = ["STAGES", "engine_defaults", "run_calibration", "run_job", "run_merge", "run_stages", "run_sweep"]

_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai",
             "mobius-onnx", "optimum", "safetensors", "numpy", "tensorrt", "tensorrt-rtx")  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A stage runs when its key changes. The key covers the options and the earlier stages it reads.

    skip: why the stage has nothing to do in a job, "" where nobody needs to be told, None where it has.
    """

    name: str
    title: str
    reads: tuple[str, ...]
    options: tuple[str, ...]
    run: Callable[[Job, Path], dict[str, Any]]
    skip: Callable[[Job], str | None] = lambda _: None


def run_job(options: JobOptions, output: Path, ui: Ui, *, force: bool = False) -> Path:
    """Checkpoint in, verified and measured NBL decoder out. Resumes what is there; `force` starts over.

    Raises:
        NblError: anything the user can put right, before anything is computed where it can be known by then.
        ParityError: the graph does not compute what the torch model computes.
    """
    preflight(options)
    _require_engine(options)
    _work(options, output, ui, force, "report")
    return output


def run_calibration(model: str, given: dict[str, Any], output: Path, ui: Ui, *, force: bool = False) -> Path | None:
    """The first stage by itself, of a new run or of one whose other options stay as they are recorded.

    None on processes of torchrun that only help.
    """
    from nbl_export import distributed

    peers = distributed.current()
    if peers.rank:
        distributed.follow(peers)
        return None
    try:
        return _calibration(model, given, output, ui, force)
    finally:
        peers.close()


def _calibration(model: str, given: dict[str, Any], output: Path, ui: Ui, force: bool) -> Path:
    refuse_foreign(output)
    recorded = {} if force else RunDirectory.peek(output).manifest.get("options", {})
    options = dataclasses.replace(JobOptions.from_json({**recorded, "model": model, "shard": None}), **given)
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
            run.finish("calibrate", key, scratch, time.monotonic() - started, _readers("calibrate"))
        ui.say(f"merge: {len(inputs)} shards, {shards.count} tokens")
    return output


def _work(options: JobOptions, output: Path, ui: Ui, force: bool, until: str) -> None:
    refuse_foreign(output)
    job = Job(options, RunDirectory(output) if force else RunDirectory.peek(output), ui)
    job.check_inputs()  # before anything is written, or, with force, removed
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
        preflight(options)
        if changes and "engine" in changes:
            _require_engine(options)
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
    run = run_stages(output, "sweep", ui, changes=changes, sweep_to=layers // 2 if max_layers is None else max_layers)
    if reported and "verify" in run.stages and "report" not in run.stages:
        run = run_stages(output, "report", ui)
    return run


def engine_defaults(engine: str, provider: str = "cpu") -> dict[str, Any]:
    """Options that an engine chooses where nobody else does."""
    capabilities = load_engine(engine, provider).CAPABILITIES
    return {"precision": capabilities.precisions[0], "decoder_source": capabilities.sources[0]}


def preflight(options: JobOptions) -> None:
    """Check engine, precision and decoder source before any work.

    Raises:
        UsageError: unknown.
        NblError: a source that does not make this precision.
    """
    from nbl_export.decoders import PRECISIONS

    check_request(options)
    engine = engine_of(options)
    capabilities = engine.CAPABILITIES
    for value, allowed, flag in (
        (options.precision, capabilities.precisions, "--precision"),
        (options.decoder_source, capabilities.sources, "--decoder-source"),
    ):
        if value not in allowed:
            raise UsageError(f"{flag} {value} is not for engine {_spoken(options)}; it takes {', '.join(allowed)}")
    for name in ("max_seq_len", "max_batch", "prefill_chunk"):
        if getattr(options, name) is not None and not capabilities.static:
            raise UsageError(f"--{name.replace('_', '-')} is not for engine {options.engine}, which compiles nothing")
    makes = PRECISIONS[options.decoder_source] if options.provider == "cpu" else capabilities.precisions
    if options.precision not in makes:
        sources = {name: made for name, made in PRECISIONS.items() if name in capabilities.sources}
        others = [f"--decoder-source {name}" for name, made in sources.items() if options.precision in made]
        raise NblError(
            f"the decoder source {options.decoder_source} makes no {options.precision} graph; "
            f"use {' or '.join([*others, '--precision ' + ', '.join(makes)])}"
        )


def _require_engine(options: JobOptions, *, to_prove: bool = False) -> None:
    """to_prove: what verification needs, which for compiled engines is ONNX Runtime."""
    engine = engine_of(options)
    name = "ort" if to_prove and engine.CAPABILITIES.static else options.engine
    found = (load_engine(name) if name != options.engine else engine).probe()
    if not found.available:
        raise NblError(f"engine {name} is not available here: {found.reason}")


def _spoken(options: JobOptions) -> str:
    return options.engine if options.provider == "cpu" else f"{options.engine} with --provider {options.provider}"


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
                job.run.finish(stage.name, keys[stage.name], scratch, seconds, _readers(stage.name), **facts)
            job.ui.say(f"{stage.title}: done in {seconds:.1f} s")
        job.run.partial(stage.name).unlink(missing_ok=True)
        if stage.name == "verify" and not ignore_failure:
            _refuse_failed(job)
    job.run.save()


def _readers(name: str) -> list[str]:
    """Stages that read a stage, directly or through others."""
    found = [name]
    for stage in STAGES:  # in order, so one walk finds them all
        if set(stage.reads) & set(found):
            found.append(stage.name)
    return found[1:]


def _reusable(job: Job, stage: Stage, key: str, ignore_failure: bool) -> bool:
    """Finished from the same inputs; a failed verification is done again, rather than believed, unless ignored."""
    if not job.run.is_done(stage.name, key):
        return False
    return stage.name != "verify" or ignore_failure or _passed(job)


def _passed(job: Job) -> bool:
    return bool(job.run.read_json("verify.json")["passed"])


def _key(job: Job, stage: Stage, keys: dict[str, str]) -> str:
    identity: list[Any] = []
    if stage.name in ("calibrate", "distill", "verify"):
        identity = [job.fingerprint, job.text_sha256, *([job.options.shard] if job.options.shard else [])]
    elif stage.name == "decoder":
        identity = [job.fingerprint, job.options.kept_logits]
    elif stage.name == "plan":
        identity = [job.request, goal_inputs(job.options)]
    elif stage.name == "sweep":
        from nbl_export.tradeoff import sweep_inputs

        identity = sweep_inputs(job)
    elif stage.name == "eval":
        identity = [job.evaluation.identity]
    elif stage.name == "build":
        identity = [job.engine.library_version()]
    chosen = {name: getattr(job.options, name) for name in stage.options}
    return key_of(stage.name, identity, chosen, [keys[name] for name in stage.reads if name in keys])


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
        "the directory is kept for inspection (verify.json, report.html)"
    )


def _report_failure(job: Job, verify: dict[str, Any]) -> None:
    """A report that says failed, without speed."""
    from nbl_export import report

    with job.run.scratch() as scratch:
        report.render(job.run.manifest, verify, None, scratch)
        job.run.finish("report", key_of("failed"), scratch, 0.0, (), status="failed")


# -- stages ----------------------------------------------------------------------------------------------


def _calibrate(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export import calibration

    return calibration.run(job, out)


def _plan(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export.plan import save_maps
    from nbl_export.planning import make_plan

    plan, maps, facts = make_plan(job)
    distilled = job.options.fit == "distilled" and plan.replaced
    save_maps(maps, out / ("start.safetensors" if distilled else "maps.safetensors"))
    return {
        "fit": {"kind": "independent"},
        "method": job.options.method,
        "replaced_layers": list(plan.replaced),
        "tap": plan.tap,
        "select": plan.select,
        "scores": [dataclasses.asdict(s) for s in plan.scores],
        **facts,
    }


def _sweep(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export import tradeoff

    value, facts = tradeoff.measure(job)
    write_json(out / "sweep.json", value)
    return facts


def _no_sweep(job: Job) -> str | None:
    return "" if job.sweep_to is None else None


def _distill(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export import distill
    from nbl_export.distill_state import FileState
    from nbl_export.plan import load_maps, save_maps

    plan, options = job.plan, job.options
    windows, held = job.windows
    steps = options.distill_steps or (distill.UNLIMITED if options.distill_minutes else distill.DEFAULT_STEPS)
    settings = distill.DistillSettings(
        steps,
        options.distill_minutes,
        seed=options.seed,
        dtype=options.distill_dtype,
        lora_rank=options.lora_rank or None,
    )
    path = job.run.path / "start.safetensors"
    start = load_maps(path, plan.replaced)
    ids = hashlib.sha256(windows.numpy().tobytes() + held.numpy().tobytes()).hexdigest()
    key = key_of(job.fingerprint, ids, file_sha256(path), dataclasses.asdict(settings))
    with job.ui.task("distilling") as progress:
        # The price is taken on the first of the held-back windows, so training is judged by the last.
        found = distill.distill(
            job.model,
            start,
            windows,
            held[len(held) // 2 :],
            settings,
            progress,
            plan.tap,
            lambda s: job.ui.say(f"  {s}"),
            FileState(job.run.partial("distill"), key),
        )
    save_maps(found.maps, out / "maps.safetensors")
    write_json(out / "distill.json", {"held_kl": found.held_kl, "train_kl": found.train_kl, "seconds": found.seconds})
    best = min(found.held_kl, key=lambda row: row[1])
    kl = {"held_kl_start": found.held_kl[0][1], "held_kl_best": best[1]}
    return {"fit": {"kind": "distilled", "steps": len(found.train_kl), "best_step": best[0], **kl}}


def _no_distill(job: Job) -> str | None:
    return None if job.options.fit == "distilled" and job.plan.replaced else ""


def _decoder(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export.decoders import build_decoder
    from nbl_export.rewrite.last_token import keep_last_token

    job.__dict__.pop("model", None)  # the exporter loads its own copy
    options = job.options
    build_decoder(
        options.decoder_source, job.checkpoint, out / "original", options.precision,
        slots=job.slots, logits=options.kept_logits, provider=options.provider,
    )  # fmt: skip
    if options.kept_logits == "last" and not job.engine.CAPABILITIES.static:  # the static source has cut its own
        keep_last_token(out / "original")
    return {"logits": options.kept_logits}


def _rewrite(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export.plan import load_maps
    from nbl_export.rewrite import rewrite

    plan = job.plan
    maps = load_maps(job.run.path / "maps.safetensors", plan.replaced)
    rewrite(job.run.path / "original", out / "model", plan, maps, dense=job.engine.CAPABILITIES.dense_caches)
    facts = {k: job.run.manifest[k] for k in _DEPLOYED_FACTS}
    if job.engine.CAPABILITIES.dense_caches:
        facts["cache_layers"] = list(plan.kept)  # of cache ids 0..K-1
    write_json(out / "model" / "nbl.json", {**facts, "versions": versions(_PACKAGES), "nbl_export": __version__})
    return {"versions": {"nbl-export": __version__, **versions(_PACKAGES)}}


_DEPLOYED_FACTS = ("schema", "model", "decoder", "options", "calibration", "num_layers", "replaced_layers", "tap",
                   "select", "method", "ranks", "fit", "scores", "logits")  # fmt: skip


def _verify(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export import verification

    _require_engine(job.options, to_prove=True)
    result = verification.run(job)
    write_json(out / "verify.json", result)
    return {"status": "verified" if result["passed"] else "failed"}


def _evaluate(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export import evaluation_job

    def keep(value: dict[str, Any]) -> None:
        with job.run.scratch() as scratch:
            write_json(scratch / "eval.json", value)
            job.run.finish("eval", key_of("unfinished"), scratch, 0.0, _readers("eval"), status=_verdict(job))

    write_json(out / "eval.json", evaluation_job.run(job, keep))
    return {"status": _verdict(job)}


def _no_eval(job: Job) -> str | None:
    """Hours on a small machine: only where it was asked for."""
    return "" if job.evaluation is None else None


def _build(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export.engines.trt_build import BuildSettings

    _require_engine(job.options)
    settings = BuildSettings(job.options.max_batch or 1, chunk_of(job.options, job.spec))
    engines = {}
    for subject, name in VARIANTS.items():
        with job.ui.task(f"compiling {name}"):
            record = job.engine.build(job.run.path / name, out / "engine" / name, settings)
        job.ui.say(f"  {name}: {record.plan_bytes / 2**20:,.0f} MiB in {record.build_seconds:.1f} s")
        engines[subject] = {k: v for k, v in record.to_json().items() if k not in ("inputs", "outputs", "schema")}
    return {"engines": engines, "status": _verdict(job)}


def _no_build(job: Job) -> str | None:
    return None if job.engine.CAPABILITIES.static else ""


def _no_bench(job: Job) -> str | None:
    """What is made may be for another machine than this."""
    if not job.engine.CAPABILITIES.cross:
        return None
    found = job.engine.probe_run()
    return None if found.available else f"what was made does not run here: {found.reason}"


def _bench(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export import bench

    capabilities = job.engine.CAPABILITIES
    _require_engine(job.options)
    options, spec, plan = job.options, job.spec, job.plan
    itemsize = capabilities.cache_itemsize(options.precision)
    threads = options.threads or job.engine.default_threads()
    setting = bench.BenchSetting(
        vocab_size=spec.vocab_size,
        context_length=job.slots,
        threads=threads,
        cache_bytes_per_token={
            "original": spec.cache_bytes_per_token(spec.num_layers, itemsize),
            "nbl": spec.cache_bytes_per_token(len(plan.kept), itemsize),
        },
        versions=versions(_PACKAGES),
        engine=options.engine,
        provider=options.provider,
        seed=options.seed,
    )
    with job.ui.task("rounds") as progress:
        result = bench.run(
            {subject: job.run.path / ("engine" if capabilities.static else "") / n for subject, n in VARIANTS.items()},
            bench.plan_scenarios(options.prompt_tokens, options.generate_tokens, options.depths),
            options.repetitions,
            functools.partial(job.engine.open_runner, threads=threads),
            progress,
            setting=setting,
        )
    write_json(out / "bench.json", result)
    return {"status": _verdict(job)}


def _report(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export import report

    verify = job.run.read_json("verify.json")
    bench = job.run.read_json("bench.json") if "bench" in job.run.stages else None
    sweep = job.run.read_json("sweep.json") if "sweep" in job.run.stages else None
    quality = job.run.read_json("eval.json") if "eval" in job.run.stages else None
    report.render({**job.run.manifest, "status": _verdict(job)}, verify, bench, out, sweep, quality)
    return {"status": _verdict(job)}


def _verdict(job: Job) -> str:
    return "verified" if _passed(job) else "failed"


VARIANTS = {"original": "original", "nbl": "model"}  # what is compared -> its directory

STAGES = (
    Stage("calibrate", "calibrate", (), ("calibration_tokens", "context", "tap"), _calibrate),
    Stage("plan", "plan", ("calibrate",), (*GOALS, "select", "method", "rank", "tap", "fit"), _plan),
    Stage("sweep", "sweep", ("calibrate",), ("select", "rank", "tap"), _sweep, _no_sweep),
    Stage(
        "distill",
        "distill",
        ("plan",),
        ("distill_steps", "distill_minutes", "distill_dtype", "lora_rank", "seed", "calibration_tokens", "context"),
        _distill,
        _no_distill,
    ),
    Stage("decoder", "decoder graph", (), ("precision", "decoder_source", "provider", "max_seq_len"), _decoder),
    Stage("rewrite", "rewrite", ("plan", "distill", "decoder"), (), _rewrite),
    Stage("verify", "verify", ("rewrite",), ("calibration_tokens", "context"), _verify),
    Stage("eval", "evaluate", ("rewrite",), (), _evaluate, _no_eval),
    Stage("build", "build", ("rewrite",), ("engine", "max_batch", "prefill_chunk"), _build, _no_build),
    Stage(
        "bench",
        "bench",
        ("rewrite", "build"),
        ("depths", "repetitions", "prompt_tokens", "generate_tokens", "threads", "seed"),
        _bench,
        _no_bench,
    ),
    Stage("report", "report", ("plan", "sweep", "verify", "eval", "build", "bench"), (), _report),
)
