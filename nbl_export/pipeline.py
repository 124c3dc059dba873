"""The main job, readable as a list: each stage, what it depends on, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export import __version__
from nbl_export.artifacts import RunDirectory, key_of, versions, write_json
from nbl_export.engines import load_engine
from nbl_export.errors import NblError, ParityError
from nbl_export.job import Job
from nbl_export.plan import parse_layers
from nbl_export.progress import Ui
from nbl_export.records import ITEMSIZE, JobOptions

__all__ = ["STAGES", "run_job", "run_stages"]

_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai",
             "mobius-onnx", "optimum", "safetensors", "numpy")  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A stage runs when its key changes. The key covers the options and the earlier stages it reads."""

    name: str
    title: str
    reads: tuple[str, ...]
    options: tuple[str, ...]
    run: Callable[[Job, Path], dict[str, Any]]


def run_job(options: JobOptions, output: Path, ui: Ui, *, force: bool = False, until: str = "report") -> Path:
    """Checkpoint in, verified and measured NBL decoder out. Resumes what is there; `force` starts over.

    Raises:
        NblError: anything the user can put right, before anything is computed where it can be known by then.
        ParityError: the graph does not compute what the torch model computes.
    """
    preflight(options)
    with RunDirectory.open_run(output, create=True, force=force) as run:
        job = Job(options, run, ui)
        job.source, job.text  # noqa: B018  reading them is the check
        parse_layers(options.layers, job.read_spec.num_layers)
        if options.context > job.read_spec.max_positions:
            raise NblError(f"--context {options.context} is beyond the model's {job.read_spec.max_positions} positions")
        job.identify()
        _advance(job, until)
    return output


def run_stages(
    output: Path, until: str, ui: Ui, *, changes: dict[str, Any] | None = None, force: bool = False
) -> RunDirectory:
    """Bring an existing run directory up to a stage, with changed options if any.

    Args:
        force: go on although verification failed.
    """
    with RunDirectory.open_run(output, create=False) as run:
        recorded = JobOptions.from_json(run.manifest["options"])
        options = dataclasses.replace(recorded, **{k: v for k, v in (changes or {}).items() if v is not None})
        preflight(options)
        job = Job(options, run, ui)
        if options != recorded:
            job.identify()
        _advance(job, until, ignore_failure=force)
        return run


def preflight(options: JobOptions) -> None:
    """Check engine, precision and decoder source before any work.

    Raises:
        NblError: unknown, or not available on this machine, with the probe's reason.
    """
    engine = load_engine(options.engine)
    capabilities = engine.CAPABILITIES
    for value, allowed, flag in (
        (options.precision, capabilities.precisions, "--precision"),
        (options.decoder_source, capabilities.sources, "--decoder-source"),
    ):
        if value not in allowed:
            raise NblError(f"{flag} {value} is not for engine {options.engine}; it takes {', '.join(allowed)}")
    found = engine.probe()
    if not found.available:
        raise NblError(f"engine {options.engine} is not available here: {found.reason}")


def _advance(job: Job, until: str, *, ignore_failure: bool = False) -> None:
    names = [stage.name for stage in STAGES]
    keys: dict[str, str] = {}
    for position, stage in enumerate(STAGES[: names.index(until) + 1]):
        keys[stage.name] = _key(job, stage, keys)
        if _reusable(job, stage, keys[stage.name]):
            job.ui.say(f"{stage.title}: reused")
        else:
            job.ui.say(f"{stage.title} ...")
            started = time.monotonic()
            with job.run.scratch() as scratch:
                facts = stage.run(job, scratch)
                seconds = time.monotonic() - started
                facts.setdefault("status", "incomplete")
                job.run.finish(stage.name, keys[stage.name], scratch, seconds, names[position + 1 :], **facts)
            job.ui.say(f"{stage.title}: done in {seconds:.1f} s")
        if stage.name == "verify" and not ignore_failure:
            _refuse_failed(job)


def _reusable(job: Job, stage: Stage, key: str) -> bool:
    """Finished from the same inputs; a failed verification is done again rather than believed."""
    if not job.run.is_done(stage.name, key):
        return False
    return stage.name != "verify" or bool(job.run.read_json("verify.json")["passed"])


def _key(job: Job, stage: Stage, keys: dict[str, str]) -> str:
    identity: list[Any] = []
    if stage.name in ("calibrate", "verify"):
        identity = [job.fingerprint, job.text_sha256]
    elif stage.name == "decoder":
        identity = [job.fingerprint]
    elif stage.name == "plan":
        identity = [job.request]
    chosen = {name: getattr(job.options, name) for name in stage.options}
    return key_of(stage.name, identity, chosen, [keys[name] for name in stage.reads])


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
    from nbl_export import calibrate

    windows, _ = job.windows
    with job.ui.task(f"{windows.numel()} tokens") as progress:
        moments = calibrate.collect(job.model, windows, progress)
    calibrate.save_moments(moments, out / "moments.safetensors")
    return {"calibration": {**job.run.manifest["calibration"], "tokens": int(windows.numel())}}


def _plan(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export import calibrate, lmmse
    from nbl_export.plan import choose, save_maps

    moments = calibrate.load_moments(job.run.path / "moments.safetensors")
    plan = choose([lmmse.score(m, i) for i, m in enumerate(moments)], job.request)
    save_maps({i: lmmse.fit(moments[i], i) for i in plan.replaced}, out / "maps.safetensors")
    return {
        "replaced_layers": list(plan.replaced),
        "tap": plan.tap,
        "select": plan.select,
        "scores": [dataclasses.asdict(s) for s in plan.scores],
    }


def _decoder(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export.decoders import build_decoder

    job.__dict__.pop("model", None)  # the exporter loads its own copy
    build_decoder(job.options.decoder_source, job.checkpoint, out / "original", job.options.precision)
    return {}


def _rewrite(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export.plan import load_maps
    from nbl_export.rewrite import rewrite

    plan = job.plan
    maps = load_maps(job.run.path / "maps.safetensors", plan.replaced)
    rewrite(job.run.path / "original", out / "model", plan, maps)
    facts = {k: job.run.manifest[k] for k in _DEPLOYED_FACTS}
    write_json(out / "model" / "nbl.json", {**facts, "versions": versions(_PACKAGES), "nbl_export": __version__})
    return {"versions": {"nbl-export": __version__, **versions(_PACKAGES)}}


_DEPLOYED_FACTS = ("schema", "model", "decoder", "options", "calibration", "num_layers", "replaced_layers", "tap",
                   "select", "scores")  # fmt: skip


def _verify(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export import verification

    result = verification.run(job)
    write_json(out / "verify.json", result)
    return {"status": "verified" if result["passed"] else "failed"}


def _bench(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export import bench

    options, spec, plan = job.options, job.spec, job.plan
    itemsize = ITEMSIZE[_cache_dtype(options.precision)]
    threads = options.threads or job.engine.default_threads()
    setting = bench.BenchSetting(
        vocab_size=spec.vocab_size,
        context_length=spec.max_positions,
        threads=threads,
        cache_bytes_per_token={
            "original": spec.cache_bytes_per_token(spec.num_layers, itemsize),
            "nbl": spec.cache_bytes_per_token(len(plan.kept), itemsize),
        },
        versions=versions(_PACKAGES),
        engine=options.engine,
        seed=options.seed,
    )
    with job.ui.task("rounds") as progress:
        result = bench.run(
            {"original": job.run.path / "original", "nbl": job.run.path / "model"},
            bench.plan_scenarios(options.prompt_tokens, options.generate_tokens, options.depths),
            options.repetitions,
            functools.partial(job.engine.open_runner, threads=threads),
            progress,
            setting=setting,
        )
    write_json(out / "bench.json", result)
    return {"status": job.run.manifest["status"]}


def _report(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export import report

    verify = job.run.read_json("verify.json")
    bench = job.run.read_json("bench.json") if "bench" in job.run.stages else None
    report.render(job.run.manifest, verify, bench, out)
    return {"status": job.run.manifest["status"]}


def _cache_dtype(precision: str) -> str:
    return "float16" if precision == "fp16" else "float32"


STAGES = (
    Stage("calibrate", "calibrate", (), ("calibration_tokens", "context"), _calibrate),
    Stage("plan", "plan", ("calibrate",), (), _plan),
    Stage("decoder", "decoder graph", (), ("precision", "decoder_source"), _decoder),
    Stage("rewrite", "rewrite", ("plan", "decoder"), (), _rewrite),
    Stage("verify", "verify", ("rewrite",), ("calibration_tokens", "context"), _verify),
    Stage(
        "bench",
        "bench",
        ("rewrite",),
        ("depths", "repetitions", "prompt_tokens", "generate_tokens", "threads", "seed"),
        _bench,
    ),
    Stage("report", "report", ("plan", "verify", "bench"), (), _report),
)
