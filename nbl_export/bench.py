"""Times decoders side by side, in llama-bench's terms, on any TextRunner.

    each variant alone, in a child process         load seconds, peak and steady memory
    for each number of threads, all loaded again and again (`rounds`); with each load, for each batch and depth:
        depth d      fill A to d, fill B to d      untimed; every run below starts by rewinding to d
          pp<T>      warm A, warm B, a round A B   with the next load B A
          tg<T>      warm A, warm B, a round A B

pp<T> at depth d: d tokens are in the cache, T more are appended as one chunk; then the first token is picked from
the logits, timed by itself. tg<T>: T tokens are appended one at a time, the clock is read after each. Round i of all
variants is a pair (or more), run one after the other; each waits until the threads of the one before have stopped
spinning, which took a core from it (`idle`). Where a load puts weights and cache in memory stays with a decoder until
it is loaded again: of six copies of one decoder the fastest was 8% ahead of the slowest at decoding, with intervals
that left no doubt (bench/README.md). So a load has one round, and the turn moves on with each. All token ids are
random, fixed by a seed and equal
for all variants. Decode appends given ids instead of sampling, so an end of text never stops it; on ONNX Runtime GenAI
`generate_next_token` with `min_length` takes the same time (SmolLM2 int4, 8 interleaved blocks of 64 tokens: medians
17.34 and 17.26 ms a token). Rewinding and appending again takes as long as a fresh fill and gives bit-equal logits.

A batch is filled in one piece and goes on with tokens of its own choice, which is what GenAI can do (see
`engines.ort`); so it has no prefill behind a cache. Memory is that of one sequence.

All decoders are in memory at once while they are timed. This module loads no engine by itself, and no torch.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from nbl_export import background
from nbl_export.errors import NblError
from nbl_export.footprint import Footprint, OpenRunner, disk_bytes, measure_footprint
from nbl_export.records import Scenario, Timing
from nbl_export.rounds import Instruments, Progress, Rule, Stand, Steps, Variant, groups, time_rounds

__all__ = ["BenchSetting", "Instruments", "Variant", "machine", "plan_scenarios", "run"]

Measure = Callable[[OpenRunner, Path, int | None, Sequence[int], int], Footprint]


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
    repetitions: int | None,
    progress: Progress,
    *,
    setting: BenchSetting,
    instruments: Instruments | None = None,
    measure: Measure = measure_footprint,
) -> dict[str, Any]:
    """Measure every scenario on every variant and return the value of bench.json.

    Args:
        variants: by name ("original", "nbl").
        scenarios: see `plan_scenarios`; those that cannot be run are left out and listed in "skipped".
        repetitions: timed rounds, each with a load and an untimed warm-up of its own; None is `rounds.Rule`'s choice.
        progress: called with (steps done, steps in all), warm-ups and fills included.

    Raises:
        NblError: no scenario fits the context, or a runner fails.
    """
    instruments = instruments or Instruments()
    fitting, skipped = _split(scenarios, setting.context_length)
    capacity = max(s.depth + s.tokens for s in fitting)
    random = np.random.default_rng(setting.seed)
    ids = random.integers(0, setting.vocab_size, (max(s.batch for s in fitting), capacity), dtype=np.int32)
    by_threads = groups(fitting, lambda s: s.threads)
    rule = Rule(repetitions) if repetitions else Rule(seconds=Rule().seconds / len(by_threads))
    steps = Steps(progress)
    steps.plan(len(variants))
    for same in by_threads:
        steps.plan_loads(rule.least, variants, same)

    prompt = ids[0, : max((s.tokens for s in fitting if s.kind == "pp"), default=1)].tolist()
    described = {}
    for name, variant in variants.items():
        footprint = measure(variant.open, variant.directory, fitting[0].threads, prompt, capacity)
        described[name] = _describe(variant, footprint, capacity)
        steps.done()
    stand = Stand(ids, instruments, steps)
    found = [time_rounds(variants, stand, same, rule, setting.base) for same in by_threads]
    loads = [load for rounds in found for load in rounds.background]
    meter = instruments.meter
    return {
        "machine": machine(),
        "background": background.described(loads, len(stand.waits), stand.waits.count(False)),
        "threads": list(dict.fromkeys(s.threads for s in fitting)),
        "batches": list(dict.fromkeys(s.batch for s in fitting)),
        "engine": setting.engine,
        "provider": setting.provider,
        "versions": dict(setting.versions),
        "seed": setting.seed,
        "repetitions": repetitions,
        "order": "all loaded anew for every round, the turn moved on by one; one discarded warm-up with each load; "
        "each run waits for the threads of the run before",
        "base": setting.base,
        **({"energy_sources": list(meter.sources)} if meter else {}),
        "timings": [_row(t) for rounds in found for t in rounds.timings],
        "skipped": skipped,
        "variants": described,
    }


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


# -- what else is recorded -----------------------------------------------------------------------------


def _facts(scenario: Scenario) -> dict[str, Any]:
    return {"test": scenario.test, **asdict(scenario)}


def _row(timing: Timing) -> dict[str, Any]:
    """Raw nanoseconds (and microjoules), and what is read off them."""
    raw = {
        "samples_ns": list(timing.samples_ns),
        "loads": list(timing.loads),
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
