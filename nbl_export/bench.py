"""Times decoders side by side, in llama-bench's terms, on any TextRunner.

    each variant alone, in a child process         load seconds, peak and steady memory
    for each number of threads, all loaded again and again; with each load, for each batch and depth:
        depth d      fill A to d, fill B to d      untimed; every run below starts by rewinding to d
          pp<T>      warm A, warm B, two rounds    A B | A B     with the next load  B A | B A
          tg<T>      warm A, warm B, two rounds    A B | A B                         B A | B A

pp<T> at depth d: d tokens are in the cache, T more are appended as one chunk; then the first token is picked from
the logits, timed by itself. tg<T>: T tokens are appended one at a time, the clock is read after each. Round i of all
variants is a pair (or more), run one after the other; each waits until the threads of the one before have stopped
spinning, which took a core from it (`idle`). Where a load puts weights and cache in memory stays with a decoder until
it is loaded again: of six copies of one decoder the fastest was 8% ahead of the slowest at decoding, with intervals
that left no doubt (bench/README.md). So no load has more than two rounds, and the turn moves on with each, but within
a load it stays, or a variant would follow itself. All token ids are random, fixed by a seed and equal
for all variants. Decode appends given ids instead of sampling, so an end of text never stops it; on ONNX Runtime GenAI
`generate_next_token` with `min_length` takes the same time (SmolLM2 int4, 8 interleaved blocks of 64 tokens: medians
17.34 and 17.26 ms a token). Rewinding and appending again takes as long as a fresh fill and gives bit-equal logits.

A batch is filled in one piece and goes on with tokens of its own choice, which is what GenAI can do (see
`engines.ort`); so it has no prefill behind a cache. Memory is that of one sequence.

All decoders are in memory at once while they are timed. This module loads no engine by itself, and no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from nbl_export.energy import Meter
from nbl_export.engines.base import TextRunner
from nbl_export.errors import NblError
from nbl_export.footprint import Footprint, OpenRunner, disk_bytes, measure_footprint
from nbl_export.idle import wait_until_idle
from nbl_export.records import Scenario, Timing

__all__ = ["BenchSetting", "Variant", "machine", "plan_scenarios", "run"]

Progress = Callable[[int, int], None]
Clock = Callable[[], int]
Measure = Callable[[OpenRunner, Path, int | None, Sequence[int], int], Footprint]

_FILL_CHUNK = 512  # tokens; 128 to 2048 fill equally fast, and attention scores of a chunk stay small
_ROUNDS_A_LOAD = 2
_WARM_UP_DECODE = 8  # tokens; llama-bench warms decode up with 1 (tools/llama-bench, test_gen(ctx, 1))


@dataclass(frozen=True)
class BenchSetting:
    """What bench has to be told of the decoders and of how they are run.

    vocab_size, context_length: of the decoders. versions: packages, recorded. base: the variant that the others are
    held against, recorded.
    """

    vocab_size: int
    context_length: int
    versions: Mapping[str, str]
    engine: str = "ort"
    provider: str = "cpu"
    seed: int = 0
    base: str | None = "original"


@dataclass(frozen=True)
class Variant:
    """A decoder to measure.

    open: loads its directory with so many threads; picklable (a function of a module, or a method of something
    that is), for the child process. cache_bytes_per_token: of one sequence.
    """

    directory: Path
    open: OpenRunner
    cache_bytes_per_token: int


def plan_scenarios(
    prompt_tokens: Sequence[int],
    generate_tokens: int,
    depths: Sequence[int],
    batches: Sequence[int] = (1,),
    threads: Sequence[int | None] = (None,),
) -> tuple[Scenario, ...]:
    """Prefills and decode at each depth, depths ascending and distinct: pp512@0, tg128@0, pp512@2048, ...

    All of that for each batch, and all of that for each number of threads.
    """
    kinds = (*(("pp", tokens) for tokens in prompt_tokens), ("tg", generate_tokens))
    return tuple(
        Scenario(kind, tokens, depth, batch, count)
        for count in threads
        for batch in batches
        for depth in sorted(set(depths))
        for kind, tokens in kinds
    )


def run(
    variants: Mapping[str, Variant],
    scenarios: Sequence[Scenario],
    repetitions: int,
    progress: Progress,
    *,
    setting: BenchSetting,
    clock: Clock = time.perf_counter_ns,
    measure: Measure = measure_footprint,
    meter: Meter | None = None,
    idle: Callable[[], None] = wait_until_idle,
) -> dict[str, Any]:
    """Measure every scenario on every variant and return the value of bench.json.

    Args:
        variants: by name ("original", "nbl").
        scenarios: see `plan_scenarios`; those that cannot be run are left out and listed in "skipped".
        repetitions: timed rounds; with every load an untimed warm-up comes before them.
        progress: called with (steps done, steps in all), warm-ups and fills included.
        clock: nanoseconds, monotonic.
        meter: of energy, read before and after each timed run; without one nothing is recorded of energy.
        idle: returns when the machine is free for the next run.

    Raises:
        NblError: no scenario fits the context, or a runner fails.
    """
    fitting, skipped = _split(scenarios, setting.context_length)
    capacity = max(s.depth + s.tokens for s in fitting)
    random = np.random.default_rng(setting.seed)
    ids = random.integers(0, setting.vocab_size, (max(s.batch for s in fitting), capacity), dtype=np.int32)
    step = _counter(progress, len(variants), fitting, repetitions)

    prompt = ids[0, : max((s.tokens for s in fitting if s.kind == "pp"), default=1)].tolist()
    described = {}
    for name, variant in variants.items():
        footprint = measure(variant.open, variant.directory, fitting[0].threads, prompt, capacity)
        described[name] = _describe(variant, footprint, capacity)
        step()
    stand = _Stand({}, ids, clock, meter, step, idle)
    by_threads = _groups(fitting, lambda s: s.threads)
    timings = [t for same in by_threads for t in _time(variants, stand, same, repetitions)]
    energy = {"energy_sources": list(meter.sources)} if meter else {}
    return {
        "machine": machine(),
        "threads": list(dict.fromkeys(s.threads for s in fitting)),
        "batches": list(dict.fromkeys(s.batch for s in fitting)),
        "engine": setting.engine,
        "provider": setting.provider,
        "versions": dict(setting.versions),
        "seed": setting.seed,
        "repetitions": repetitions,
        "order": "all loaded anew every two rounds, the turn moved on by one; one discarded warm-up with each load; "
        "each run on an idle machine",
        "base": setting.base,
        **energy,
        "timings": [_row(t) for t in timings],
        "skipped": skipped,
        "variants": described,
    }


# -- timing --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stand:
    """What every timed run uses: loaded runners by name, token ids [B, T], clock, meter, a step of progress, idle."""

    runners: Mapping[str, TextRunner]
    ids: np.ndarray
    clock: Clock
    meter: Meter | None
    step: Callable[[], None]
    idle: Callable[[], None]


@dataclass(frozen=True)
class _Sample:
    """One run: nanoseconds in all, of each chunk, of the pick of a first token; microjoules."""

    total_ns: int
    chunk_ns: tuple[int, ...]
    pick_ns: int | None
    energy_uj: int | None


def _time(
    variants: Mapping[str, Variant], stand: _Stand, scenarios: Sequence[Scenario], repetitions: int
) -> Iterator[Timing]:
    """Time scenarios that share a number of threads, with all variants loaded for every two rounds."""
    samples: dict[tuple[Scenario, str], list[_Sample]] = {(s, name): [] for s in scenarios for name in variants}
    for number, rounds in enumerate(_loads(repetitions)):
        turn = _rotated(list(variants), number)
        with contextlib.ExitStack() as stack:
            opened = {
                n: stack.enter_context(variants[n].open(variants[n].directory, scenarios[0].threads)) for n in turn
            }
            for group in _groups(scenarios, lambda s: (s.batch, s.depth)):
                for scenario, name, sample in _time_group(dataclasses.replace(stand, runners=opened), group, rounds):
                    samples[scenario, name].append(sample)
    return (_timing(scenario, name, found) for (scenario, name), found in samples.items())


def _loads(repetitions: int) -> list[int]:
    """Rounds of each load."""
    return [min(_ROUNDS_A_LOAD, repetitions - done) for done in range(0, repetitions, _ROUNDS_A_LOAD)]


def _rotated(names: list[str], by: int) -> list[str]:
    start = by % len(names)
    return names[start:] + names[:start]


def _time_group(stand: _Stand, scenarios: Sequence[Scenario], rounds: int) -> Iterator[tuple[Scenario, str, _Sample]]:
    """Fill every runner to the common depth of the scenarios, then time these one after the other."""
    depth, batch = scenarios[0].depth, scenarios[0].batch
    for runner in stand.runners.values():
        runner.begin(depth + max(s.tokens for s in scenarios), batch)
        for chunk in _chunks(stand.ids, batch, 0, depth, _FILL_CHUNK if batch == 1 else depth):
            runner.append(chunk)
        stand.step()
    for scenario in scenarios:
        for runner in stand.runners.values():
            _sample(stand, runner, _warm_up(scenario))
            stand.step()
        for name in tuple(stand.runners) * rounds:
            yield scenario, name, _sample(stand, stand.runners[name], scenario)
            stand.step()


def _timing(scenario: Scenario, variant: str, samples: Sequence[_Sample]) -> Timing:
    return Timing(
        scenario,
        variant,
        tuple(s.total_ns for s in samples),
        first_token_ns=tuple(s.pick_ns for s in samples if s.pick_ns is not None),
        token_ns=tuple(s.chunk_ns for s in samples) if scenario.kind == "tg" else (),
        energy_uj=tuple(s.energy_uj for s in samples if s.energy_uj is not None),
    )


def _sample(stand: _Stand, runner: TextRunner, scenario: Scenario) -> _Sample:
    """One run of a scenario on a runner that holds at least its depth."""
    clock, end = stand.clock, scenario.depth + scenario.tokens
    size = scenario.tokens if scenario.kind == "pp" else 1
    chunks = _chunks(stand.ids, scenario.batch, scenario.depth, end, size)
    runner.rewind(scenario.depth)
    stand.idle()
    before = stand.meter.read() if stand.meter else None
    with _collector_paused():
        stamps = [clock()]
        for chunk in chunks:
            runner.append(chunk)
            stamps.append(clock())
        picked = None
        if scenario.kind == "pp":
            runner.pick()
            picked = clock()
    energy = None if stand.meter is None or before is None else stand.meter.read() - before
    steps = tuple(after - start for start, after in itertools.pairwise(stamps))
    return _Sample(stamps[-1] - stamps[0], steps, None if picked is None else picked - stamps[-1], energy)


def _warm_up(scenario: Scenario) -> Scenario:
    """The same run, decode cut short: it allocates the same buffers from its first token on."""
    if scenario.kind == "pp":
        return scenario
    return dataclasses.replace(scenario, tokens=min(scenario.tokens, _WARM_UP_DECODE))


def _chunks(ids_BT: np.ndarray, batch: int, start: int, end: int, size: int) -> list[Any]:
    """Columns start..end in pieces: ids [T] of the first row, or [B, T] of a batch."""
    rows = ids_BT[0] if batch == 1 else ids_BT[:batch]
    return [rows[..., i : min(i + size, end)] for i in range(start, end, size)] if end > start else []


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _split(scenarios: Sequence[Scenario], context: int) -> tuple[list[Scenario], list[dict[str, Any]]]:
    """Scenarios that can be run, and the others as rows with the reason."""
    reasons = {s: _reason(s, context) for s in scenarios}
    fitting = [s for s in scenarios if not reasons[s]]
    skipped = [{**_facts(s), "reason": reason} for s, reason in reasons.items() if reason]
    if not fitting:
        raise NblError(f"nothing to measure: {skipped[0]['reason']}")
    return fitting, skipped


def _reason(scenario: Scenario, context: int) -> str:
    if scenario.batch > 1 and scenario.kind == "pp" and scenario.depth:
        return "a batch is filled in one piece, so there is no prefill behind a cache; --batch 1 has one"
    picked = scenario.batch > 1  # a batch ends with the token that it picked last
    if scenario.depth + scenario.tokens + picked > context:
        own = " and one that is picked" if picked else ""
        return f"{scenario.depth} + {scenario.tokens} tokens{own} are more than the context of the model, {context}"
    return ""


def _groups(scenarios: Sequence[Scenario], key: Callable[[Scenario], Any]) -> list[list[Scenario]]:
    """Scenarios with the same key, keys in the order in which they first come, scenarios in theirs."""
    found: dict[Any, list[Scenario]] = {}
    for scenario in scenarios:
        found.setdefault(key(scenario), []).append(scenario)
    return list(found.values())


def _counter(progress: Progress, variants: int, scenarios: Sequence[Scenario], repetitions: int) -> Callable[[], None]:
    """A function that reports one more step of: footprints; fills and warm-ups of every load; rounds."""
    fills = len({(s.threads, s.batch, s.depth) for s in scenarios})
    total = variants * (1 + len(_loads(repetitions)) * (fills + len(scenarios)) + len(scenarios) * repetitions)
    done = itertools.count(1)
    return lambda: progress(next(done), total)


# -- what else is recorded -----------------------------------------------------------------------------


def _facts(scenario: Scenario) -> dict[str, Any]:
    return {"test": scenario.test, **asdict(scenario)}


def _row(timing: Timing) -> dict[str, Any]:
    """Raw nanoseconds (and microjoules), and what is read off them."""
    raw = {
        "samples_ns": list(timing.samples_ns),
        "first_token_ns": list(timing.first_token_ns),
        "token_ns": [list(run) for run in timing.token_ns],
        "energy_uj": list(timing.energy_uj),
        "ttft_ns": timing.ttft_ns,
        "tpot_ns": timing.tpot_ns,
    }
    return {**_facts(timing.scenario), "variant": timing.variant, **{k: v for k, v in raw.items() if v}}


def _describe(variant: Variant, footprint: Footprint, tokens: int) -> dict[str, Any]:
    directory = variant.directory
    return {
        **asdict(footprint),
        "kv_cache_bytes": variant.cache_bytes_per_token * tokens,
        "kv_cache_bytes_per_token": variant.cache_bytes_per_token,
        "model_bytes": sum(p.stat().st_size for kind in ("model.onnx*", "*.engine") for p in directory.glob(kind)),
        "disk_bytes": disk_bytes(directory),
    }


def machine() -> dict[str, Any]:
    """Processor, physical cores, memory, system and Python of this machine."""
    return {
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
