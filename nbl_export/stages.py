"""The stages of a job: what each depends on, what it does, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export import __version__
from nbl_export.artifacts import file_sha256, key_of, versions, write_json
from nbl_export.goals import GOALS, goal_inputs
from nbl_export.graph_source import GIVEN
from nbl_export.held_back import DIVISION
from nbl_export.job import Job, chunk_of
from nbl_export.nbl_checkpoint import GIVEN_FIT, NO_ORIGINAL
from nbl_export.preflight import require_engine
from nbl_export.records import layers_below
from nbl_export.typed_json import edited

__all__ = ["PACKAGES", "STAGES", "VARIANTS", "Stage", "passed", "readers"]

PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai",
             "mobius-onnx", "optimum", "safetensors", "numpy", "tensorrt", "tensorrt-rtx")  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A stage runs when its key changes. The key covers the options and the earlier stages it reads.

    identity: what it reads beside options and stages, as JSON values.
    skip: why the stage has nothing to do in a job, "" where nobody needs to be told, None where it has.
    """

    name: str
    title: str
    reads: tuple[str, ...]
    options: tuple[str, ...]
    run: Callable[[Job, Path], dict[str, Any]]
    identity: Callable[[Job], list[Any]] = lambda _: []
    skip: Callable[[Job], str | None] = lambda _: None


def _calibrate(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export import calibration

    return calibration.run(job, out)


def _no_calibrate(job: Job) -> str | None:
    return NO_ORIGINAL if job.options.fit == GIVEN_FIT else None


def _plan(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export import nbl_checkpoint
    from nbl_export.plan import save_maps
    from nbl_export.planning import make_plan

    given = job.options.fit == GIVEN_FIT
    facts: dict[str, Any] = {"ranks": {}, "goal": None}
    if given:
        plan, maps = nbl_checkpoint.load(job.source, job.spec.num_layers)
    else:
        plan, maps, facts = make_plan(job)
    distilled = job.options.fit == "distilled" and plan.replaced
    save_maps(maps, out / ("start.safetensors" if distilled else "maps.safetensors"), plan.tap)
    return {
        "fit": {"kind": GIVEN_FIT if given else "independent"},
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
    return _no_calibrate(job) if job.sweep_to is not None else ""


def _distill(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export import distill, distributed
    from nbl_export.distill_state import FileState
    from nbl_export.plan import load_maps, save_maps

    plan, options = job.plan, job.options
    windows, judging = job.training_windows, job.held_back.choosing
    steps = options.distill_steps or (distill.UNLIMITED if options.distill_minutes else distill.DEFAULT_STEPS)
    settings = distill.DistillSettings(
        steps,
        options.distill_minutes,
        seed=options.seed,
        dtype=options.distill_dtype,
        lora_rank=options.lora_rank or None,
        label_weight=options.label_weight,
    )
    path = job.run.path / "start.safetensors"
    start = load_maps(path, plan.replaced)
    ids = hashlib.sha256(windows.numpy().tobytes() + judging.numpy().tobytes()).hexdigest()
    key = key_of(job.fingerprint, ids, file_sha256(path), dataclasses.asdict(settings))
    peers = distributed.current()
    given = {"maps": start, "windows": windows, "held": judging, "settings": settings, "tap": plan.tap}
    peers.lead({"work": "distill", "checkpoint": str(job.checkpoint.absolute()), **given})
    peers.agree(None)
    with job.ui.task("distilling") as progress:
        found = distill.distill(
            peers.place(job.model),
            start,
            windows,
            judging,
            settings,
            progress,
            plan.tap,
            lambda s: job.ui.say(f"  {s}"),
            FileState(job.run.partial("distill"), key),
            peers,
        )
    peers.done()
    save_maps(found.maps, out / "maps.safetensors", plan.tap)
    write_json(out / "distill.json", {"held_kl": found.held_kl, "train_kl": found.train_kl, "seconds": found.seconds})
    best = min(found.held_kl, key=lambda row: row[1])
    kl = {"held_kl_start": found.held_kl[0][1], "held_kl_best": best[1]}
    how = {"kind": "distilled", "label_weight": settings.label_weight}
    return {"fit": {**how, "steps": len(found.train_kl), "best_step": best[0], **kl}}


def _no_distill(job: Job) -> str | None:
    return None if job.options.fit == "distilled" and job.plan.replaced else ""


def _decoder(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export.decoders import build_decoder
    from nbl_export.graph_source import copy_graph
    from nbl_export.rewrite.last_token import keep_last_token

    job.__dict__.pop("model", None)  # the exporter loads its own copy
    options = job.options
    if job.graph is not None:
        copy_graph(job.graph, out / "original")
    else:
        build_decoder(
            options.decoder_source, job.checkpoint, out / "original", options.precision,
            slots=job.slots, provider=options.provider, options=options.builder_option, codes=_codes(job),
        )  # fmt: skip
    if options.kept_logits == "last":
        keep_last_token(out / "original")
    return {"logits": options.kept_logits}


def _codes(job: Job) -> Path | None:
    """The quantised checkpoint, which is of this model."""
    from nbl_export import quantized

    if job.quantized is None:
        return None
    quantized.check_same(job.quantized, job.checkpoint, job.options.tap)
    return Path(job.quantized.directory)


def _form(job: Job) -> list[str]:
    """What a decoder of the static form depends on beside; runs made before it had a pruned tail export it again."""
    return ["pruned tail"] if job.engine.CAPABILITIES.static else []


def _rewrite(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export.plan import load_maps
    from nbl_export.rewrite import rewrite
    from nbl_export.rewrite.token_table import table_bytes
    from nbl_export.token_rows import rows_of

    plan = job.plan
    maps = load_maps(job.run.path / "maps.safetensors", plan.replaced)
    dense, bits = job.engine.CAPABILITIES.dense_caches, job.options.map_bits
    rows = rows_of(job, maps)
    rewrite(job.run.path / "original", out / "model", plan, maps, dense=dense, map_bits=bits, rows_VD=rows)
    facts = {k: job.run.manifest[k] for k in _DEPLOYED_FACTS}
    if job.engine.CAPABILITIES.dense_caches:
        facts["cache_layers"] = list(plan.kept)  # of cache ids 0..K-1
    write_json(out / "model" / "nbl.json", {**facts, "versions": versions(PACKAGES), "nbl_export": __version__})
    table = None if rows is None else {"layers": list(layers_below(maps)), "bytes": table_bytes(out / "model")}
    return {"token_table": table, "versions": {"nbl-export": __version__, **versions(PACKAGES)}}


_DEPLOYED_FACTS = ("schema", "model", "decoder", "options", "calibration", "num_layers", "replaced_layers", "tap",
                   "select", "method", "ranks", "fit", "scores", "logits")  # fmt: skip


def _verify(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export import graph_verification, verification

    require_engine(job.options, to_prove=True)
    result = verification.run(job) if job.graph is None else graph_verification.run(job)
    write_json(out / "verify.json", result)
    return {"status": "verified" if result["passed"] else "failed"}


def _evaluate(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export import evaluation_job

    def keep(value: dict[str, Any]) -> None:
        with job.run.scratch() as scratch:
            write_json(scratch / "eval.json", value)
            job.run.finish("eval", key_of("unfinished"), scratch, 0.0, readers("eval"), status=_verdict(job))

    write_json(out / "eval.json", evaluation_job.run(job, keep))
    return {"status": _verdict(job)}


def _no_eval(job: Job) -> str | None:
    """Hours on a small machine: only where it was asked for."""
    return "" if job.evaluation is None else None


def _build(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export.engines.trt_build import BuildSettings

    require_engine(job.options)
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
    """What is made may be for another machine than this, or not for the runtime that bench drives."""
    if job.options.decoder_source == GIVEN and not (job.run.path / "original" / "genai_config.json").is_file():
        return "the model has no genai_config.json, and ONNX Runtime GenAI is what is timed"
    if not job.engine.CAPABILITIES.cross:
        return None
    found = job.engine.probe_run()
    return None if found.available else f"what was made does not run here: {found.reason}"


def _bench(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export import background, bench, energy
    from nbl_export.limits import limits_of

    capabilities = job.engine.CAPABILITIES
    require_engine(job.options)
    options, spec, plan = job.options, job.spec, job.plan
    itemsize = capabilities.cache_itemsize(options.precision)
    threads = options.threads or (job.engine.default_threads(),)
    root = job.run.path / ("engine" if capabilities.static else "")
    variants = {
        subject: bench.Variant(root / name, job.engine.open_runner, spec.cache_bytes_per_token(kept, itemsize))
        for (subject, name), kept in zip(VARIANTS.items(), (spec.num_layers, len(plan.kept)), strict=True)
    }
    setting = bench.BenchSetting(
        vocab_size=spec.vocab_size,
        context_length=job.slots,
        versions=versions(PACKAGES),
        engine=options.engine,
        provider=options.provider,
        seed=options.seed,
    )
    scenarios = bench.plan_scenarios(
        options.prompt_tokens, options.generate_tokens, options.depths, options.batches, threads
    )
    instruments = bench.Instruments(meter=energy.find_meter(gpu=capabilities.static or options.provider != "cpu"))
    with job.ui.task("rounds") as progress:
        result = bench.run(variants, scenarios, options.repetitions, progress, setting=setting, instruments=instruments)
    if result["background"]["busy"]:
        job.ui.say(f"  {background.spoken(result['background'])}")
    write_json(out / "bench.json", {**result, **limits_of(job, result)})
    return {"status": _verdict(job)}


def _report(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export import report

    verify = job.run.read_json("verify.json")
    bench = job.run.read_json("bench.json") if "bench" in job.run.stages else None
    sweep = job.run.read_json("sweep.json") if "sweep" in job.run.stages else None
    quality = job.run.read_json("eval.json") if "eval" in job.run.stages else None
    with edited(
        job.run.path, "remove its verify.json, bench.json, sweep.json and eval.json, or start over with --force"
    ):
        report.render({**job.run.manifest, "status": _verdict(job)}, verify, bench, out, sweep, quality)
    return {"status": _verdict(job)}


def _verdict(job: Job) -> str:
    return "verified" if passed(job) else "failed"


def passed(job: Job) -> bool:
    return bool(job.run.read_json("verify.json")["passed"])


def _parts(job: Job) -> list[Any]:
    return [*_texts(job), DIVISION]


def _texts(job: Job) -> list[Any]:
    return [job.fingerprint, job.text_sha256, *([job.options.shard] if job.options.shard else [])]


def _sweep_inputs(job: Job) -> list[Any]:
    from nbl_export.tradeoff import sweep_inputs

    return sweep_inputs(job)


VARIANTS = {"original": "original", "nbl": "model"}  # what is compared -> its directory

STAGES = (
    Stage("calibrate", "calibrate", (), ("calibration_tokens", "context", "tap"), _calibrate, _texts, _no_calibrate),
    Stage(
        "plan", "plan", ("calibrate",), (*GOALS, "select", "method", "rank", "tap", "fit"), _plan,
        lambda job: [job.request, goal_inputs(job.options), DIVISION],
    ),
    Stage("sweep", "sweep", ("calibrate",), ("select", "rank", "tap"), _sweep, _sweep_inputs, _no_sweep),
    Stage(
        "distill", "distill", ("plan",),
        ("distill_steps", "distill_minutes", "distill_tokens", "distill_dtype", "lora_rank", "label_weight",
         "seed", "calibration_tokens", "context"),
        _distill, _parts, _no_distill,
    ),
    Stage(
        "decoder", "decoder graph", (),
        ("precision", "decoder_source", "provider", "builder_option", "max_seq_len"), _decoder,
        lambda job: [job.fingerprint, job.options.kept_logits, *_form(job), *job.codes],
    ),
    Stage("rewrite", "rewrite", ("plan", "distill", "decoder"), ("map_bits", "token_table"), _rewrite),
    Stage("verify", "verify", ("rewrite",), ("calibration_tokens", "context"), _verify, _parts),
    Stage("eval", "evaluate", ("rewrite",), (), _evaluate, lambda job: [job.evaluation.identity], _no_eval),
    Stage(
        "build", "build", ("rewrite",), ("engine", "max_batch", "prefill_chunk"), _build,
        lambda job: [job.engine.library_version()], _no_build,
    ),
    Stage(
        "bench", "bench", ("rewrite", "build"),
        ("depths", "repetitions", "prompt_tokens", "generate_tokens", "threads", "batches", "seed"),
        _bench, skip=_no_bench,
    ),
    Stage("report", "report", ("plan", "sweep", "verify", "eval", "build", "bench"), (), _report),
)  # fmt: skip


def readers(name: str) -> list[str]:
    """Stages that read a stage, directly or through others."""
    found = [name]
    for stage in STAGES:  # in order, so one walk finds them all
        if set(stage.reads) & set(found):
            found.append(stage.name)
    return found[1:]
