"""Times decoders side by side, in llama-bench's terms, on any TextRunner.

    each variant alone, in a child process         peak and steady memory
    repeated loads of all variants (`rounds`); with each load, for each depth:
        depth d      fill A to d, fill B to d      untimed; every run below starts by rewinding to d
          pp<T>      warm A, warm B, a round A B   with the next load B A
          tg<T>      warm A, warm B, a round A B

pp<T> at depth d: d tokens are in the cache, and T more are appended as one chunk. Then the first token is picked from
the logits and timed separately. tg<T>: T tokens are appended one at a time, and the clock is read after each token.
Token ids are random, fixed by a seed, and equal for all variants.

Each run waits until the threads of the previous run are idle (`instruments`). A load has one round (`rounds`), and the
order of variants rotates with each load.

Decode appends given ids instead of sampling, so an end-of-text token never stops a run. On ONNX Runtime GenAI,
`generate_next_token` with `min_length` takes the same time (SmolLM2 int4, 8 interleaved blocks of 64 tokens: medians
17.34 and 17.26 ms a token). Rewinding and appending again takes as long as a fresh fill and gives bit-equal logits.

All decoders are in memory at once during timing, unless memory is too short for that (`rounds`). This module itself
loads neither an engine nor torch.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from nbl_export.errors import NblError
from nbl_export.files import versions
from nbl_export.measure.clocks import read_clocks
from nbl_export.measure.footprint import Footprint, OpenRunner, measure_footprint
from nbl_export.measure.instruments import Instruments, background_of
from nbl_export.measure.rounds import Bench, Progress, Rule, Steps, Variant, time_rounds
from nbl_export.model.memory import available_bytes
from nbl_export.options.options import GPU_DECODE, JobOptions
from nbl_export.records.results import Scenario, describe_background
from nbl_export.run_directory import PACKAGES
from nbl_export.targets.gpu import describe, free_bytes

__all__ = ["BenchSetting", "decode_tokens", "machine", "plan_scenarios", "run", "side_by_side"]

Measure = Callable[[OpenRunner, Path, int | None, Sequence[int], int, bool], Footprint]


@dataclass(frozen=True)
class BenchSetting:
    """Facts about the decoders and the engine that the benchmark needs.

    vocab_size, context_length: of the decoders. base: the variant that the others are compared with. threads: of
    the engine. gpu: whether the decoders run on a GPU.
    """

    vocab_size: int
    context_length: int
    engine: str
    provider: str = "cpu"
    base: str | None = "original"
    threads: int | None = None
    gpu: bool = False


@dataclass(frozen=True)
class BenchTests:
    """The tests that are asked for; names as in the options."""

    prompt_tokens: tuple[int, ...]
    generate_tokens: int | None
    depths: tuple[int, ...]
    threads: int | None
    repetitions: int | None


def side_by_side(
    variants: Mapping[str, Variant],
    tests: BenchTests | JobOptions,
    setting: BenchSetting,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Plan the tests that are asked for, and measure them on every variant.

    Args:
        variants: by name.
        say: told that the machine was busy, if it was.

    Returns:
        The value of bench.json.

    Raises:
        NblError: no test fits the context, or a runner fails.
    """
    directories = [variant.directory for variant in variants.values()]
    decoded = decode_tokens(tests.generate_tokens, directories, gpu=setting.gpu)
    scenarios = plan_scenarios(tests.prompt_tokens, decoded, tests.depths)
    instruments = Instruments()
    if setting.gpu:
        instruments = Instruments(clocks=read_clocks, warm_up_ns=_GPU_WARM_UP_NS, least_ns=_GPU_LEAST_NS)
    result = run(variants, scenarios, tests.repetitions, progress, setting=setting, instruments=instruments)
    if result["background"]["busy"]:
        say(f"  {describe_background(result['background'])}")
    return result


def plan_scenarios(prompt_tokens: Sequence[int], generate_tokens: int, depths: Sequence[int]) -> tuple[Scenario, ...]:
    """Prefills and decode at each depth, depths ascending and distinct: pp512@0, tg128@0, pp512@2048, ..."""
    kinds = (*(("pp", tokens) for tokens in prompt_tokens), ("tg", generate_tokens))
    return tuple(Scenario(kind, tokens, depth) for depth in sorted(set(depths)) for kind, tokens in kinds)


def decode_tokens(asked: int | None, directories: Iterable[Path], *, gpu: bool) -> int:
    """Length of the decode test: the length that is asked for, or 128 tokens as in llama-bench.

    A step on a CPU reads all weights. So a large model gets half, a quarter or an eighth of the tokens, at least 16:
    the most with which the largest model reads at most `_DECODE_BYTES` a run.
    """
    if asked is not None:
        return asked
    if gpu:
        return GPU_DECODE
    size = max(map(_model_bytes, directories))
    return next((tokens for tokens in (128, 64, 32) if tokens * size <= _DECODE_BYTES), 16)


_DECODE_BYTES = 80 << 30  # eight seconds at 10 GB/s
# A GPU raises its clocks under load. NVIDIA's trtexec warms up for 0.2 s and measures for 3 s.
_GPU_WARM_UP_NS = 500_000_000
_GPU_LEAST_NS = 1_000_000_000
_MEMORY_SHARE = 0.9  # of the available memory, for the peaks of all variants together


def run(
    variants: Mapping[str, Variant],
    scenarios: Sequence[Scenario],
    repetitions: int | None,
    progress: Progress,
    *,
    setting: BenchSetting,
    instruments: Instruments | None = None,
    measure: Measure | None = None,
) -> dict[str, Any]:
    """Measure every scenario on every variant and return the value of bench.json.

    Args:
        variants: by name ("original", "nbl").
        scenarios: see `plan_scenarios`; scenarios that cannot run are listed in "skipped".
        repetitions: timed rounds, each with its own load and untimed warm-up; None lets `rounds.Rule` decide.
        progress: called with (steps done, total steps), warm-ups and fills included.
        measure: reads the memory of a variant; None: `measure_footprint`.

    Raises:
        NblError: no scenario fits the context, or a runner fails.
    """
    instruments = instruments or Instruments()
    measure = measure or measure_footprint
    fitting, skipped = _split(scenarios, setting.context_length)
    capacity = max(s.depth + s.tokens for s in fitting)
    ids = np.random.default_rng(0).integers(0, setting.vocab_size, capacity, dtype=np.int32)
    rule = Rule(repetitions)
    steps = Steps(progress)
    steps.plan(len(variants))
    steps.plan_loads(rule.least, variants, fitting)

    prompt = ids[: max((s.tokens for s in fitting if s.kind == "pp"), default=1)].tolist()
    described = {}
    for name, variant in variants.items():
        footprint = measure(variant.open, variant.directory, setting.threads, prompt, capacity, setting.gpu)
        described[name] = _describe(variant, footprint, capacity)
        steps.done()
    apart = _are_too_large(described.values(), gpu=setting.gpu)
    bench = Bench(ids, setting.threads, instruments, steps, apart)
    timings, loads = time_rounds(variants, bench, fitting, rule, setting.base)
    return {
        "machine": machine(gpu=setting.gpu),
        "versions": versions(PACKAGES),
        **({"gpu_clocks": _clocks_of(bench.clocks)} if bench.clocks else {}),
        "background": background_of(loads, len(bench.waits), bench.waits.count(False)),
        "threads": setting.threads,
        "engine": setting.engine,
        "provider": setting.provider,
        "repetitions": repetitions,
        "apart": bench.apart,
        "base": setting.base,
        "timings": [timing.to_json() for timing in timings],
        "skipped": skipped,
        "variants": described,
    }


def _clocks_of(seen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Clocks right behind the timed runs: the lowest and highest, and how many runs ended slowed, by reason."""
    clocks = {name: [clock[name] for clock in seen if name in clock] for name in ("sm_mhz", "memory_mhz")}
    reasons = [why for clock in seen for why in clock.get("slowed_by", ())]
    slowed = {why: reasons.count(why) for why in dict.fromkeys(reasons)}
    ranges = {name: [min(values), max(values)] for name, values in clocks.items() if values}
    return {"runs": len(seen), **ranges, "slowed_by": slowed}


def _are_too_large(described: Collection[Mapping[str, Any]], *, gpu: bool) -> bool:
    """Whether the variants do not fit into memory together: that of the GPU if they run there, else the machine's."""
    on_device = [facts["device_memory_bytes"] for facts in described if "device_memory_bytes" in facts]
    if gpu and len(on_device) == len(described) and (free := free_bytes()) is not None:
        return bool(sum(on_device) > _MEMORY_SHARE * free)
    return bool(sum(facts["peak_memory_bytes"] for facts in described) > _MEMORY_SHARE * available_bytes())


def _split(scenarios: Sequence[Scenario], context: int) -> tuple[list[Scenario], list[dict[str, Any]]]:
    """Scenarios that can run, and a row with the reason for each other scenario."""
    longer = [s for s in scenarios if s.depth + s.tokens > context]
    said = (f"{s.depth} + {s.tokens} tokens exceed the context length of the model, {context}" for s in longer)
    skipped = [{**s.facts(), "reason": reason} for s, reason in zip(longer, said, strict=True)]
    if len(longer) == len(scenarios):
        raise NblError(f"nothing to measure: {skipped[0]['reason']}")
    return [s for s in scenarios if s not in longer], skipped


def _describe(variant: Variant, footprint: Footprint, tokens: int) -> dict[str, Any]:
    directory = variant.directory
    return {
        **{name: value for name, value in asdict(footprint).items() if value is not None},
        "kv_cache_bytes": variant.cache_bytes_per_token * tokens,
        "kv_cache_bytes_per_token": variant.cache_bytes_per_token,
        "model_bytes": _model_bytes(directory),
    }


def _model_bytes(directory: Path) -> int:
    return sum(
        path.stat().st_size for kind in ("model.onnx*", "*.engine", "openvino_model.*") for path in directory.glob(kind)
    )


def machine(*, gpu: bool = False) -> dict[str, Any]:
    """Processor, physical cores, memory in bytes, operating system, Python version and GPU of this machine.

    Args:
        gpu: whether the work ran on the GPU; only then is the GPU named.
    """
    found, now = (describe(), read_clocks() or {}) if gpu else (None, {})
    kept = {name: now[name] for name in ("driver", "power_limit_watts") if name in now}  # its clocks rest now
    return {
        **({"gpu": {**found, **kept}} if found else {}),
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "os": platform.platform(),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
