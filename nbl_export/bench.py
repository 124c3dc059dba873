"""Times the original and the NBL decoder side by side, in llama-bench's terms, on any TextRunner.

    each variant alone, in a child process         load seconds, peak and steady memory
    both loaded, one depth after the other:
        depth d      fill A to d, fill B to d      untimed, once; every run below starts by rewinding to d
          pp<T>      warm A, warm B, then rounds   A B | B A | A B ...
          tg<T>      warm A, warm B, then rounds   A B | B A | A B ...

pp<T> at depth d: d tokens are in the cache, T more are appended as one chunk. tg<T>: T tokens are appended
one at a time. Round i of both variants is a pair, run back to back; who goes first alternates, so that neither
profits from a machine that warms up or slows down. All token ids are random, fixed by a seed and equal for
both variants. Decode appends given ids instead of sampling, so an end of text never stops it; on ONNX Runtime GenAI
`generate_next_token` with `min_length` takes the same time (SmolLM2 int4, 8 interleaved blocks of 64 tokens: medians
17.34 and 17.26 ms a token). Rewinding and appending again takes as long as a fresh fill and gives bit-equal logits.

Both decoders are in memory at once while they are timed. This module loads no engine by itself, and no torch.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from nbl_export.engines.base import TextRunner
from nbl_export.errors import NblError
from nbl_export.records import Scenario, Timing

__all__ = ["BenchSetting", "Footprint", "machine", "measure_footprint", "plan_scenarios", "run"]

OpenRunner = Callable[[Path], TextRunner]
Progress = Callable[[int, int], None]
Clock = Callable[[], int]

_FILL_CHUNK = 512  # tokens; 128 to 2048 fill equally fast, and attention scores of a chunk stay small
_WARM_UP_DECODE = 8  # tokens; llama-bench warms decode up with 1 (tools/llama-bench, test_gen(ctx, 1))
_FOOTPRINT_DECODE = 8  # tokens decoded before memory is read
_LOADS = 3  # load seconds is the median of so many,
_CHEAP_LOAD_SECONDS = 10.0  # unless the first one takes longer than this


@dataclass(frozen=True)
class BenchSetting:
    """What bench has to be told of the decoders and of how they are run.

    vocab_size, context_length: of the decoder. threads: what open_runner was told, recorded.
    cache_bytes_per_token: of each variant, one sequence. versions: packages, recorded.
    """

    vocab_size: int
    context_length: int
    threads: int
    cache_bytes_per_token: Mapping[str, int]
    versions: Mapping[str, str]
    engine: str = "ort"
    provider: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Footprint:
    """What one decoder alone in a process takes: bytes of resident memory and seconds.

    peak: largest resident set of the process, interpreter and engine library included (about 35 MB before a
    model is loaded); file pages that the engine maps count while they are resident. steady: resident set
    with the model loaded and the sequence in its cache. load: opening the runner, files in the page cache.
    """

    peak_memory_bytes: int
    steady_memory_bytes: int
    load_seconds: float


Measure = Callable[[OpenRunner, Path, Sequence[int], int], Footprint]


def plan_scenarios(prompt_tokens: int, generate_tokens: int, depths: Sequence[int]) -> tuple[Scenario, ...]:
    """Prefill and decode at each depth, depths ascending and distinct: pp512@0, tg128@0, pp512@2048, ..."""
    kinds = (("pp", prompt_tokens), ("tg", generate_tokens))
    return tuple(Scenario(kind, tokens, depth) for depth in sorted(set(depths)) for kind, tokens in kinds)


def run(
    directories: Mapping[str, Path],
    scenarios: Sequence[Scenario],
    repetitions: int,
    open_runner: OpenRunner,
    progress: Progress,
    *,
    setting: BenchSetting,
    clock: Clock = time.perf_counter_ns,
    measure: Measure | None = None,
) -> dict[str, Any]:
    """Measure every scenario on every variant and return the value of bench.json.

    Args:
        directories: variant ("original", "nbl") -> model directory.
        scenarios: see `plan_scenarios`; those that outgrow the context are left out and listed in "skipped".
        repetitions: timed rounds; one untimed warm-up comes before them.
        open_runner: loads a directory; picklable (a function of a module or a `functools.partial` of one), for
            the child process.
        progress: called with (steps done, steps in all), warm-ups and fills included.
        clock: nanoseconds, monotonic. measure: `measure_footprint` unless given.

    Raises:
        NblError: no scenario fits the context, or a runner fails.
    """
    fitting, skipped = _split(scenarios, setting.context_length)
    capacity = max(s.depth + s.tokens for s in fitting)
    ids = np.random.default_rng(setting.seed).integers(0, setting.vocab_size, capacity, dtype=np.int32)
    step = _counter(progress, len(directories), fitting, repetitions)

    prompt = ids[: max((s.tokens for s in fitting if s.kind == "pp"), default=1)].tolist()
    variants = {}
    for name, directory in directories.items():
        footprint = (measure or measure_footprint)(open_runner, directory, prompt, capacity)
        variants[name] = _variant(directory, footprint, setting.cache_bytes_per_token[name], capacity)
        step()
    with contextlib.ExitStack() as stack:
        runners = {name: stack.enter_context(open_runner(path)) for name, path in directories.items()}
        timings = [
            t for group in _by_depth(fitting) for t in _time_depth(runners, group, repetitions, ids, clock, step)
        ]
    return {
        "machine": machine(),
        "threads": setting.threads,
        "engine": setting.engine,
        "provider": setting.provider,
        "versions": dict(setting.versions),
        "seed": setting.seed,
        "repetitions": repetitions,
        "order": "rounds of all variants, who goes first alternates; one discarded warm-up each",
        "timings": [_row(t) for t in timings],
        "skipped": skipped,
        "variants": variants,
    }


# -- timing --------------------------------------------------------------------------------------------


def _time_depth(
    runners: Mapping[str, TextRunner],
    scenarios: Sequence[Scenario],
    repetitions: int,
    ids: np.ndarray,
    clock: Clock,
    step: Callable[[], None],
) -> Iterator[Timing]:
    """Fill every runner to the common depth of the scenarios, then time these one after the other."""
    depth = scenarios[0].depth
    for runner in runners.values():
        runner.begin(depth + max(s.tokens for s in scenarios))
        for chunk in _chunks(ids[:depth], _FILL_CHUNK):
            runner.append(chunk)
        step()
    for scenario in scenarios:
        samples: dict[str, list[int]] = {name: [] for name in runners}
        for runner in runners.values():
            _sample(runner, _warm_up(scenario), ids, clock)
            step()
        for name in _order(tuple(runners), repetitions):
            samples[name].append(_sample(runners[name], scenario, ids, clock))
            step()
        yield from (Timing(scenario, name, tuple(ns)) for name, ns in samples.items())


def _sample(runner: TextRunner, scenario: Scenario, ids: np.ndarray, clock: Clock) -> int:
    """Nanoseconds of one run of a scenario on a runner that holds at least its depth."""
    run_ids = ids[scenario.depth : scenario.depth + scenario.tokens]
    chunks = _chunks(run_ids, scenario.tokens if scenario.kind == "pp" else 1)
    runner.rewind(scenario.depth)
    with _collector_paused():
        start = clock()
        for chunk in chunks:
            runner.append(chunk)
        return clock() - start


def _order(names: Sequence[str], repetitions: int) -> Iterator[str]:
    """A B, B A, A B, ...: one round after the other."""
    for i in range(repetitions):
        yield from names if i % 2 == 0 else reversed(names)


def _warm_up(scenario: Scenario) -> Scenario:
    """The same run, decode cut short: it allocates the same buffers from its first token on."""
    if scenario.kind == "pp":
        return scenario
    return Scenario(scenario.kind, min(scenario.tokens, _WARM_UP_DECODE), scenario.depth)


def _chunks(ids: np.ndarray, size: int) -> list[Any]:
    return [ids[i : i + size] for i in range(0, len(ids), size)]


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
    """Scenarios that fit the context, and the others as rows with the reason."""
    fitting = [s for s in scenarios if s.depth + s.tokens <= context]
    skipped = [
        {
            "test": s.test,
            "depth": s.depth,
            "reason": f"{s.depth} + {s.tokens} tokens are more than the context of the model, {context}",
        }
        for s in scenarios
        if s not in fitting
    ]
    if not fitting:
        raise NblError(f"nothing to measure: no scenario fits the context of the model, {context} tokens")
    return fitting, skipped


def _by_depth(scenarios: Sequence[Scenario]) -> list[list[Scenario]]:
    ordered = sorted(scenarios, key=lambda s: s.depth)
    return [list(group) for _, group in itertools.groupby(ordered, key=lambda s: s.depth)]


def _counter(progress: Progress, variants: int, scenarios: Sequence[Scenario], repetitions: int) -> Callable[[], None]:
    """A function that reports one more step of: footprints, fills, warm-ups, rounds."""
    total = variants * (1 + len(_by_depth(scenarios)) + len(scenarios) * (1 + repetitions))
    done = itertools.count(1)
    return lambda: progress(next(done), total)


# -- what else is recorded -----------------------------------------------------------------------------


def _row(timing: Timing) -> dict[str, Any]:
    scenario = timing.scenario
    return {
        "test": scenario.test,
        "kind": scenario.kind,
        "tokens": scenario.tokens,
        "depth": scenario.depth,
        "variant": timing.variant,
        "samples_ns": list(timing.samples_ns),
    }


def _variant(directory: Path, footprint: Footprint, cache_bytes_per_token: int, tokens: int) -> dict[str, Any]:
    return {
        **asdict(footprint),
        "kv_cache_bytes": cache_bytes_per_token * tokens,
        "kv_cache_bytes_per_token": cache_bytes_per_token,
        "model_bytes": sum(p.stat().st_size for kind in ("model.onnx*", "*.engine") for p in directory.glob(kind)),
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


# -- footprint, in a child process ---------------------------------------------------------------------


def measure_footprint(open_runner: OpenRunner, directory: Path, prompt: Sequence[int], capacity: int) -> Footprint:
    """Load a decoder alone in a fresh process, run the prompt and a few tokens, and read memory there.

    capacity: tokens to reserve the cache for, as the timed runs do. The child is gone on return, also on Ctrl-C.

    Raises:
        NblError: the runner failed in the child, or the system ended it (out of memory, usually).
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(there, open_runner, directory, prompt, capacity), daemon=True)
    resource_tracker.ensure_running()  # its start would let interrupts through again, in the middle of ours
    with _interrupts_held():
        child.start()
    there.close()  # the child's copy is the only one left, so its death ends the wait
    try:
        answer = here.recv()
    except EOFError:
        child.join()
        raise NblError(
            f"measuring {directory} failed: the process it was loaded in ended with status {child.exitcode} "
            f"(-9 is mostly a lack of memory: close other programs, or use a smaller precision)"
        ) from None
    finally:
        here.close()
        child.terminate()
        child.join()
    if isinstance(answer, str):
        raise NblError(answer)
    return answer


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back. A process started meanwhile never gets it: this one does too, and ends it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child(out: Connection, open_runner: OpenRunner, directory: Path, prompt: Sequence[int], capacity: int) -> None:
    try:
        out.send(_footprint(open_runner, directory, prompt, capacity))
    except NblError as error:
        out.send(str(error))


def _footprint(open_runner: OpenRunner, directory: Path, prompt: Sequence[int], capacity: int) -> Footprint:
    start = time.perf_counter()
    with open_runner(directory) as runner:
        seconds = [time.perf_counter() - start]
        runner.begin(capacity)
        runner.append(prompt)
        for token in prompt[: min(_FOOTPRINT_DECODE, capacity - len(prompt))]:
            runner.append([token])
        steady = psutil.Process().memory_info().rss
        peak = max(_peak_memory_bytes(), steady)  # the kernel's two counters may differ by a page
    while len(seconds) < _LOADS and seconds[0] < _CHEAP_LOAD_SECONDS:
        start = time.perf_counter()
        with open_runner(directory):
            seconds.append(time.perf_counter() - start)
    return Footprint(peak, steady, statistics.median(seconds))


def _peak_memory_bytes() -> int:
    """Largest resident set so far, of this process's own memory.

    Linux keeps it as VmHWM. Its ru_maxrss is no use here: it starts from the memory of the process that
    started this one (getrusage(2) after execve), which may have held much more.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
