"""Times decoders in turns: one round with each load, until their ratios are narrow enough.

    load A B ─► for each batch and depth: fill, warm up, a run of A, a run of B, ... ─► close ─► load B A ─► ...
    after 6, 12 and 18 loads: every interval within 10%, or 3 minutes over before the next of these? ─► end;  24 ─► end

A load keeps its memory layout until the next one, so rounds of one load are not independent (bench/README.md, "The
order of rounds"). So a load has one round.

Rounds end by the width of the intervals, never by their verdict: a rule that waits for a winner finds one where there
is none. An interval of a small sample is narrow by chance now and then, so it is looked at four times at most. Under
this rule it held the median in 94 of 100 trials or more, whatever the noise (bench/intervals.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export import background
from nbl_export.energy import Meter
from nbl_export.engines.base import TextRunner
from nbl_export.footprint import OpenRunner
from nbl_export.idle import wait_until_idle
from nbl_export.paired import PairedRatio, paired_ratio
from nbl_export.records import Scenario, Timing

__all__ = ["LOOKS", "NARROW", "Instruments", "Progress", "Rounds", "Rule", "Stand", "Steps", "Variant",
           "groups", "time_rounds"]  # fmt: skip

LOOKS = (6, 12, 18, 24)  # loads after which rounds may end; with fewer no interval is held with 95%
NARROW = 1.1  # upper end of an interval over its lower end
_SECONDS = 180.0
_FILL_CHUNK = 512  # tokens; 128 to 2048 fill equally fast, and attention scores of a chunk stay small
_WARM_UP_DECODE = 8  # tokens; llama-bench warms decode up with 1 (tools/llama-bench, test_gen(ctx, 1))

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Variant:
    """A decoder to measure.

    open: loads its directory with so many threads; picklable (a function of a module, or a method of something
    that is), for the child process. cache_bytes_per_token: of one sequence.
    """

    directory: Path
    open: OpenRunner
    cache_bytes_per_token: int


@dataclass(frozen=True)
class Instruments:
    """What is read beside the decoders.

    clock: nanoseconds, monotonic. meter: of energy, read before and after each timed run; without one nothing is
    recorded of energy. idle: waits until no thread of this process computes, and says whether that came. usage:
    processor time of the machine, read around each load.
    """

    clock: Callable[[], int] = time.perf_counter_ns
    meter: Meter | None = None
    idle: Callable[[], bool] = wait_until_idle
    usage: Callable[[], background.Reading] = background.read


@dataclass(frozen=True)
class Rule:
    """When rounds end: after `count`, or, without it, when the ratios are narrow or a limit is reached.

    seconds: rounds do not go on to the next look if it would come later.
    """

    count: int | None = None
    seconds: float = _SECONDS

    @property
    def least(self) -> int:
        return self.count or LOOKS[0]

    def ends(self, done: int, seconds: float, ratios: Iterable[PairedRatio]) -> bool:
        """Whether `done` loads, which took so many seconds together, are enough."""
        if self.count is not None or done >= LOOKS[-1]:
            return done >= self.least
        if done not in LOOKS:
            return False
        following = LOOKS[LOOKS.index(done) + 1]
        return seconds * following / done > self.seconds or all(ratio.high <= NARROW * ratio.low for ratio in ratios)


class Steps:
    """Progress of the steps planned so far: the caller's own; fills, warm-ups and runs of every load."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._done, self._total = progress, 0, 0

    def plan(self, count: int) -> None:
        self._total += count

    def plan_loads(self, count: int, variants: Mapping[str, Variant], scenarios: Sequence[Scenario]) -> None:
        fills = len({(s.batch, s.depth) for s in scenarios})
        self.plan(count * len(variants) * (fills + 2 * len(scenarios)))

    def done(self) -> None:
        """One more."""
        self._done += 1
        self._progress(self._done, self._total)


@dataclass(frozen=True)
class Stand:
    """What every timed run uses: token ids [B, T], instruments, progress, what each wait answered."""

    ids: np.ndarray
    instruments: Instruments
    steps: Steps
    waits: list[bool] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class Rounds:
    """Timings, and what other processes used during each load (`background.used_between`)."""

    timings: list[Timing]
    background: list[dict[str, Any]]


@dataclass(frozen=True)
class _Sample:
    """One run: nanoseconds in all, of each chunk, of the pick of a first token; microjoules."""

    total_ns: int
    chunk_ns: tuple[int, ...]
    pick_ns: int | None
    energy_uj: int | None


def time_rounds(
    variants: Mapping[str, Variant], stand: Stand, scenarios: Sequence[Scenario], rule: Rule, base: str | None
) -> Rounds:
    """Time scenarios that share a number of threads.

    Args:
        stand: its progress has `rule.least` loads planned.
        base: the variant whose ratios to the others are to become narrow; without one the least loads are enough.
    """
    samples: dict[tuple[Scenario, str], list[_Sample]] = {(s, name): [] for s in scenarios for name in variants}
    used: list[dict[str, Any]] = []
    for number in itertools.count():
        if number >= rule.least:
            stand.steps.plan_loads(1, variants, scenarios)
        before = stand.instruments.usage()
        for scenario, name, sample in _load(variants, stand, scenarios, _rotated(list(variants), number)):
            samples[scenario, name].append(sample)
        used.append(background.used_between(before, stand.instruments.usage()))
        if rule.ends(len(used), sum(load["seconds"] for load in used), _ratios(samples, base)):
            break
    return Rounds([_timing(s, name, found) for (s, name), found in samples.items()], used)


def _load(
    variants: Mapping[str, Variant], stand: Stand, scenarios: Sequence[Scenario], turn: Sequence[str]
) -> Iterator[tuple[Scenario, str, _Sample]]:
    """Load all variants, and run every scenario once on each."""
    with contextlib.ExitStack() as stack:
        runners = {n: stack.enter_context(variants[n].open(variants[n].directory, scenarios[0].threads)) for n in turn}
        for group in groups(scenarios, lambda s: (s.batch, s.depth)):
            yield from _time_group(stand, runners, group)


def _rotated(names: list[str], by: int) -> list[str]:
    start = by % len(names)
    return names[start:] + names[:start]


def _ratios(samples: Mapping[tuple[Scenario, str], Sequence[_Sample]], base: str | None) -> Iterator[PairedRatio]:
    for (scenario, name), own in samples.items():
        if name != base and (scenario, base) in samples:
            old = [s.total_ns for s in samples[scenario, str(base)]]
            yield paired_ratio(old, [s.total_ns for s in own], range(len(own)))


def groups(scenarios: Sequence[Scenario], key: Callable[[Scenario], Any]) -> list[list[Scenario]]:
    """Scenarios with the same key, keys in the order in which they first come, scenarios in theirs."""
    found: dict[Any, list[Scenario]] = {}
    for scenario in scenarios:
        found.setdefault(key(scenario), []).append(scenario)
    return list(found.values())


def _time_group(
    stand: Stand, runners: Mapping[str, TextRunner], scenarios: Sequence[Scenario]
) -> Iterator[tuple[Scenario, str, _Sample]]:
    """Fill every runner to the common depth of the scenarios, then time these one after the other."""
    depth, batch = scenarios[0].depth, scenarios[0].batch
    for runner in runners.values():
        runner.begin(depth + max(s.tokens for s in scenarios), batch)
        for chunk in _chunks(stand.ids, batch, 0, depth, _FILL_CHUNK if batch == 1 else depth):
            runner.append(chunk)
        stand.steps.done()
    for scenario in scenarios:
        for runner in runners.values():
            _sample(stand, runner, _warm_up(scenario))
            stand.steps.done()
        for name, runner in runners.items():
            yield scenario, name, _sample(stand, runner, scenario)
            stand.steps.done()


def _timing(scenario: Scenario, variant: str, samples: Sequence[_Sample]) -> Timing:
    return Timing(
        scenario,
        variant,
        tuple(s.total_ns for s in samples),
        loads=tuple(range(len(samples))),
        first_token_ns=tuple(s.pick_ns for s in samples if s.pick_ns is not None),
        token_ns=tuple(s.chunk_ns for s in samples) if scenario.kind == "tg" else (),
        energy_uj=tuple(s.energy_uj for s in samples if s.energy_uj is not None),
    )


def _sample(stand: Stand, runner: TextRunner, scenario: Scenario) -> _Sample:
    """One run of a scenario on a runner that holds at least its depth."""
    clock, meter = stand.instruments.clock, stand.instruments.meter
    end = scenario.depth + scenario.tokens
    size = scenario.tokens if scenario.kind == "pp" else 1
    chunks = _chunks(stand.ids, scenario.batch, scenario.depth, end, size)
    runner.rewind(scenario.depth)
    stand.waits.append(stand.instruments.idle())
    before = meter.read() if meter else None
    with _collector_paused():
        stamps = [clock()]
        for chunk in chunks:
            runner.append(chunk)
            stamps.append(clock())
        picked = None
        if scenario.kind == "pp":
            runner.pick()
            picked = clock()
    energy = None if meter is None or before is None else meter.read() - before
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
