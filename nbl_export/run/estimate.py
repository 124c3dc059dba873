"""What a job will take, told before it begins; a job that cannot end is refused.

    config.json, or the head of a GGUF file ─► sizes ┐
    options, settled as the main job settles them ───┼─► seconds, memory and disk of each stage, gain of a prompt
    short products on this machine ──────────────────┘

A job that resumes counts the stages that are left: those that are not recorded, have another key, or read such a stage.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.measure.estimate import Job as EstimatedJob
from nbl_export.measure.estimate import Needs, ProductSpeed, measure_products
from nbl_export.methods.checkpoint.shape import Shape, read_shape
from nbl_export.model import processes
from nbl_export.model.memory import available_bytes, holds
from nbl_export.options.goals import asked_increase
from nbl_export.options.options import AUTO_EXIT, CHECKPOINT_FIT, NO_EXIT, SMALLEST, JobOptions
from nbl_export.options.settle import hub_id, settle
from nbl_export.report.estimate import describe_totals
from nbl_export.report.words import size
from nbl_export.run.job import Job
from nbl_export.run.settled import capabilities_of, model_facts
from nbl_export.run.stages.common import Skipped, Stage
from nbl_export.targets.base import default_threads

__all__ = ["describe_estimate", "describe_machine", "estimate", "stages_left"]

# Of the default jobs in bench/results/exit-layers.json.
MEASURED = (
    "measured: 1.32x for SmolLM2-135M and 1.36x for Qwen2.5-Coder-0.5B, prompts of 2,048 tokens, within 5%, in ONNX "
    "Runtime int8 on a CPU (docs/results.md)"
)


def estimate(model: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a whole job will take, by stages, and what is expected of it; reads no weight.

    Raises:
        NblError: there is no such model here or on the hub, it does not state its sizes, or an option does not fit.
    """
    model = hub_id(model)
    shape = read_shape(model)
    known = model_facts(shape.decoder, shape.maps_tap, shape.kinds, fits=holds(shape.parameters))
    options = settle({**asked, "model": model}, capabilities_of, known)
    job = _job(shape, options)
    free = shutil.disk_usage(Path.cwd()).free
    stages = job.needs()
    names = ("engine", "precision", "fit", "calibration_tokens", "context")
    return {
        "model": model,
        "decoder": dataclasses.asdict(shape.decoder),
        "parameters": shape.parameters,
        "options": {name: getattr(options, name) for name in names},
        "machine": {
            "product_flops_per_second": job.product_flops_per_second,
            "share": _speed().share,
            "tiles": job.tiles,
            "memory_bytes": job.available_bytes,
            "disk_bytes": free,
        },
        "stages": [dataclasses.asdict(stage) for stage in stages],
        **_totals(stages),
        "expected": list(_expected(job)),
        "replaced": job.count,
        "gains": [dataclasses.asdict(gain) for gain in job.gains()],
        "refused": _shortage(stages, job.available_bytes, free, Path.cwd()),
    }


def describe_estimate(job: Job, left: Sequence[Stage[Any]], output: Path) -> str:
    """What the stages that are left will take, in words; "" if none is left, or if the model's sizes are not known.

    Raises:
        NblError: memory or disk cannot suffice.
    """
    source = job.source.value
    try:
        shape = read_shape(source.gguf or source.directory)
    except NblError:  # transformers knows sizes that the configuration does not state
        return ""
    estimated = _job(dataclasses.replace(shape, decoder=job.decoder), job.options)
    names = {stage.name for stage in left}
    shared = {stage.name for stage in left if stage.shared}
    needs = [need for need in _of_all_processes(estimated, shared) if need.stage in names]
    if not needs:
        return ""
    total = _totals(needs)
    place = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if refused := _shortage(needs, estimated.available_bytes, shutil.disk_usage(place).free, output):
        raise NblError(refused)
    said = f"estimate: {describe_totals(total)}"
    if job.options.precision == SMALLEST and not estimated.fits:
        said += (
            f"\n  weights in {SMALLEST}: in float32 they take {size(estimated.weights)}; --precision sets another type"
        )
    expected = _expected(estimated) if "plan" in names else ()
    return "\n  ".join([said, *expected])


def _of_all_processes(job: EstimatedJob, shared: Collection[str]) -> Iterator[Needs]:
    """What stages take on this machine. One process converts a GGUF file, and each has what a shared stage holds."""
    converted = dataclasses.replace(job, shape=dataclasses.replace(job.shape, is_gguf=False))
    for need, each in zip(job.needs(), converted.needs(), strict=True):
        count = processes.local() if need.stage in shared else 1
        yield dataclasses.replace(need, memory_bytes=max(need.memory_bytes, count * each.memory_bytes))


def _expected(job: EstimatedJob) -> Iterator[str]:
    """The method of a job, what limits its loss, and its gain, in sentences."""
    options = job.options
    if options.fit == CHECKPOINT_FIT:  # nothing is chosen
        return
    if not options.predicts:
        left = f"; predicted KV is left out, since {job.no_exit}" if job.no_exit else ""
        yield f"method: linear layers in place of attention{left}"
    elif options.exit_layer == AUTO_EXIT:
        yield "method: predicted KV above an exit layer, which the job chooses; most of a prompt skips the layers above"
    else:
        yield f"method: predicted KV above layer {options.exit_layer}; most of a prompt skips the layers above"
    if options.layers is None and options.exit_layer in (AUTO_EXIT, NO_EXIT):
        limit = f"{100 * asked_increase(options):g}%"
        yield f"loss: perplexity may rise by {limit} on each text; if nothing keeps that, the job says so"
    else:
        yield "loss: not limited, since the layers are named; the report says what they lose"
    yield _describe_gain(job)
    if options.predicts:
        yield MEASURED


def _describe_gain(job: EstimatedJob) -> str:
    """What the kind of a job can give for the longer prompt, and what predicted KV would give."""
    found = job.gains()
    count = job.shape.decoder.num_layers
    tokens = max(gain.tokens for gain in found)
    gains = (
        f"{gain.speedup:.2f}x as fast with {gain.kind} in {gain.layers} of {count} layers"
        f"{'' if gain.is_asked else ' (--exit-layer auto)'}"
        for gain in found
        if gain.tokens == tokens
    )
    return f"gain: a prompt of {tokens:,} tokens is, by counted work, about {', '.join(gains)}"


def _job(shape: Shape, options: JobOptions) -> EstimatedJob:
    engine = capabilities_of(options.engine, options.provider)
    tiles = options.compute_dtype != "float32" and _has_products("amx_tile")
    return EstimatedJob(shape, options, engine, _speed().flops_per_second, tiles, available_bytes())


def _speed() -> ProductSpeed:
    return measure_products(default_threads())


def _totals(needs: Sequence[Needs]) -> dict[str, float]:
    seconds = sum(stage.seconds for stage in needs)
    return {
        "seconds": seconds,
        "busy_seconds": seconds / _speed().share,
        "memory_bytes": max(stage.memory_bytes for stage in needs),
        "disk_bytes": sum(stage.disk_bytes for stage in needs),
    }


def _shortage(needs: Sequence[Needs], memory: float, disk: float, output: Path) -> str:
    """Why the stages cannot end, in a sentence; "" if memory and disk can suffice."""
    most = max(needs, key=lambda stage: stage.memory_bytes)
    left = _totals(needs)["disk_bytes"]
    if most.memory_bytes > memory:
        return (
            f"the stage {most.stage} needs {size(most.memory_bytes)} of memory at least, and {size(memory)} are "
            f"available: {'start fewer processes, ' * (processes.local() > 1)}close other programs, or take a machine "
            "with more memory or a smaller model"
        )
    if left > disk:
        return (
            f"the run needs {size(left)} of disk, and {output} has {size(disk)} left: free some, or "
            "choose another --output"
        )
    return ""


def stages_left(job: Job, stages: Sequence[Stage[Any]]) -> list[Stage[Any]]:
    """The stages that will run."""
    known = job.run.manifest.get("stages", {})
    left: list[Stage[Any]] = []
    for stage in stages:
        if {each.name for each in left} & set(stage.reads):
            left.append(stage)
            continue
        declared = stage.declared(job)
        if not isinstance(declared, Skipped) and declared[1] != known.get(stage.name, {}).get("key"):
            left.append(stage)
    return left


def describe_machine() -> str:
    """Processor, memory and fast number types of this machine in a line."""
    from nbl_export.measure.benchmark import machine

    found = machine()
    products = "with" if _has_products("avx512_bf16", "amx_tile") else "without"
    cores = found["cores"]
    memory = size(found["memory_bytes"])
    return f"processor: {found['cpu']}, cores: {cores}, {products} bfloat16 products; memory: {memory}"


@functools.cache
def _has_products(*names: str) -> bool:
    """Whether the processor has one of these instructions for bfloat16 products, as `bfloat16.has_native_bf16` says."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return False
    return any(name in flags for name in names)
