"""The bench stage: both decoders measured side by side."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbl_export.cost import model, roofline
from nbl_export.cost.roofline import MachineRates
from nbl_export.errors import NblError
from nbl_export.files import versions, write_json
from nbl_export.model.memory import available_bytes
from nbl_export.plan.maps_file import load_maps
from nbl_export.run.facts import require_engine
from nbl_export.run.job import Job
from nbl_export.run.stages.common import VARIANTS, cost_of, verdict
from nbl_export.run_directory import BENCH_FILE, MAPS_FILE, PACKAGES

__all__ = ["limits_of", "measure_machine", "run"]


def run(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export.measure import background, benchmark, energy

    capabilities = job.engine.capabilities
    require_engine(job.options)
    options, spec, plan = job.options, job.spec, job.plan
    itemsize = capabilities.cache_itemsize(options.precision)
    threads = options.threads or (job.engine.default_threads(),)
    root = job.run.path / ("engine" if capabilities.static else "")
    setting = benchmark.BenchSetting(
        vocab_size=spec.vocab_size,
        context_length=job.slots,
        versions=versions(PACKAGES),
        engine=options.engine,
        provider=options.provider,
    )
    gpu = capabilities.static or options.provider != "cpu"
    directories = {subject: root / name for subject, name in VARIANTS.items()}
    new_tokens = benchmark.decode_tokens(options.generate_tokens, directories.values(), gpu=gpu)
    scenarios = benchmark.plan_scenarios(options.prompt_tokens, new_tokens, options.depths, options.batches, threads)
    open_runner = functools.partial(job.engine.open_runner, room=benchmark.room_for(scenarios, job.slots))
    variants = {
        subject: benchmark.Variant(directory, open_runner, spec.cache_bytes_per_token(kept, itemsize))
        for (subject, directory), kept in zip(directories.items(), (spec.num_layers, len(plan.kept)), strict=True)
    }
    instruments = benchmark.Instruments(meter=energy.find_meter(gpu=gpu))
    with job.ui.task("rounds") as progress:
        result = benchmark.run(
            variants, scenarios, options.repetitions, progress, setting=setting, instruments=instruments
        )
    if result["background"]["busy"]:
        job.ui.say(f"  {background.spoken(result['background'])}")
    said = {subject: job.engine.arithmetic(directory) for subject, directory in directories.items()}
    arithmetic = {"arithmetic": said} if any(said.values()) else {}
    write_json(out / BENCH_FILE, {**result, **limits_of(job, result), **arithmetic})
    return {"status": verdict(job)}


_BYTES = 2 << 30  # required free memory; the measurement takes 0.6 GB


def limits_of(job: Job, bench: Mapping[str, Any]) -> dict[str, Any]:
    """Hardware limits to add to bench.json; empty for another engine than ONNX Runtime on a CPU.

    Also empty if machine or decoder are unknown, or if memory is short.
    """
    capabilities = job.engine.capabilities
    if capabilities.static or capabilities.graphs != "onnx" or job.options.provider != "cpu":
        return {}
    if available_bytes() < _BYTES:  # the measurement would make a small machine swap
        return {}
    try:
        costs = cost_of(job)
    except NblError:  # the checkpoint is gone, or the configuration of a graph does not state the MLP's width
        return {}
    sizes = model.map_sizes(load_maps(job.run.path / MAPS_FILE, job.plan.replaced))
    found = []
    for threads in bench["threads"]:
        timings = [t for t in bench["timings"] if t["threads"] == threads and t["batch"] == 1]
        if timings:
            rates = _rates(threads)
            rows = roofline.expect(roofline.rows({"timings": timings}, costs, sizes, rates, job.options.precision))
            found.append({"rates": rates.to_json(), "rows": [{"threads": threads, "batch": 1, **row} for row in rows]})
    return {"limits": found} if found else {}


def measure_machine(threads: int) -> MachineRates:
    """Measure this machine's rates with a number of threads, in seconds and 0.6 GB of memory.

    Other programs that run at the same time make the rates too low.

    Raises:
        NblError: ONNX Runtime is not installed.
    """
    from nbl_export.measure import rates

    try:
        products = rates.gemm_flops_per_second(threads)
    except ImportError as error:
        raise NblError(
            f"measuring the machine needs onnxruntime and onnx ({error}): install nbl-export[cpu]"
        ) from error
    return MachineRates(products, rates.read_bytes_per_second(threads), threads)


_rates = functools.cache(measure_machine)  # each process measures the machine once
