"""Times decoders in turns: one round with each load, until the intervals of their ratios are narrow.

    load A B ─► for each depth: fill, warm up, a run of A, a run of B, ... ─► close ─► load B A ─► ...
    after 6, 12 and 18 loads: every interval within 10%, or the next check after 3 minutes? ─► end;  24 ─► end

If memory is short, each variant is loaded and closed by itself: load A, every scenario, close, the same for B.
The clock is read when the device has finished: `append` of every engine waits for it (`targets.runners.TextRunner`).

A load fixes the memory layout of weights and cache. Of six copies of one decoder, the fastest decoded 8% faster than
the slowest, with clearly separate intervals (bench/EXPERIMENTS.md, "Measurement"). So a load has one round.

The width of the intervals ends the rounds, never the verdict: waiting for a winner finds one even if there is none.
A small sample's interval can be narrow by chance, so there are at most four checks. With this rule the interval
contained the median in at least 94.4% of the trials for every noise (`paired.LEVEL_UNTIL_NARROW`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.measure.footprint import OpenRunner
from nbl_export.measure.instruments import Instruments, used_between
from nbl_export.records.paired import PairedRatio, paired_ratio
from nbl_export.records.results import Scenario, Timing
from nbl_export.targets.runners import TextRunner

__all__ = ["INTERIM_ROUNDS", "NARROW", "Bench", "Progress", "Rule", "Steps", "Variant", "time_rounds"]

# Loads after which rounds may end. Five would be too few: their range contains the median with 1 - 2/32 = 93.75% only.
INTERIM_ROUNDS = (6, 12, 18, 24)
NARROW = 1.1  # upper end of an interval divided by its lower end
_SECONDS = 180.0
_FILL_CHUNK = 512  # tokens; 128 to 2048 fill equally fast, and attention scores of a chunk stay small
# Tokens, as in llama-bench (tools/llama-bench, test_gen(ctx, 1)). The first token behind a prefill takes no longer than
# later tokens (bench/EXPERIMENTS.md, "Measurement").
_WARM_UP_DECODE = 1

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Variant:
    """A decoder to measure.

    open: loads the directory with a number of threads; picklable for the child process (a function of a module, or a
    method of a picklable object). cache_bytes_per_token: of one sequence.
    """

    directory: Path
    open: OpenRunner
    cache_bytes_per_token: int


@dataclass(frozen=True)
class Rule:
    """When rounds end: after `count` rounds, or, if `count` is None, with narrow intervals or at a limit.

    seconds: rounds end if the next check would come later than this.
    """

    count: int | None = None
    seconds: float = _SECONDS

    @property
    def least(self) -> int:
        return self.count or INTERIM_ROUNDS[0]

    def ends(self, done: int, seconds: float, ratios: Iterable[PairedRatio]) -> bool:
        """Whether `done` loads, which took `seconds` together, are enough."""
        if self.count is not None or done >= INTERIM_ROUNDS[-1]:
            return done >= self.least
        if done not in INTERIM_ROUNDS:
            return False
        following = INTERIM_ROUNDS[INTERIM_ROUNDS.index(done) + 1]
        return seconds * following / done > self.seconds or all(ratio.high <= NARROW * ratio.low for ratio in ratios)


class Steps:
    """Progress over the planned steps: the caller's own steps, and fills, warm-ups and runs of every load."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done = 0
        self._total = 0

    def plan(self, count: int) -> None:
        self._total += count

    def plan_loads(self, count: int, variants: Mapping[str, Variant], scenarios: Sequence[Scenario]) -> None:
        fills = len({s.depth for s in scenarios})
        self.plan(count * len(variants) * (fills + 2 * len(scenarios)))

    def done(self) -> None:
        """Report one more finished step."""
        self._done += 1
        self._progress(self._done, self._total)


@dataclass(frozen=True)
class Bench:
    """Shared by every timed run: token ids [T], threads, instruments, progress, the result of each wait, and clocks.

    apart: only one variant is in memory at a time.
    """

    ids: np.ndarray
    threads: int | None
    instruments: Instruments
    steps: Steps
    apart: bool = False
    waits: list[bool] = dataclasses.field(default_factory=list)
    clocks: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)


def time_rounds(
    variants: Mapping[str, Variant], bench: Bench, scenarios: Sequence[Scenario], rule: Rule, base: str | None
) -> tuple[list[Timing], list[dict[str, Any]]]:
    """Time scenarios; also the use of each load (`instruments.used_between`).

    Args:
        bench: its progress already plans `rule.least` loads.
        base: the variant whose ratios to the others must become narrow; None ends after `rule.least` loads.
    """
    runs: dict[tuple[Scenario, str], list[Timing]] = {(s, name): [] for s in scenarios for name in variants}
    used: list[dict[str, Any]] = []
    for number in itertools.count():
        if number >= rule.least:
            bench.steps.plan_loads(1, variants, scenarios)
        before = bench.instruments.usage()
        start = number % len(variants)
        for timing in _load(variants, bench, scenarios, [*variants][start:] + [*variants][:start]):
            runs[timing.scenario, timing.variant].append(dataclasses.replace(timing, loads=(number,)))
        used.append(used_between(before, bench.instruments.usage()))
        if rule.ends(len(used), sum(load["seconds"] for load in used), _ratios(runs, base)):
            break
    return [_joined(found) for found in runs.values()], used


def _joined(runs: Sequence[Timing]) -> Timing:
    names = ("samples_ns", "loads", "first_token_ns", "token_ns")
    fields: dict[str, Any] = {name: tuple(x for run in runs for x in getattr(run, name)) for name in names}
    return dataclasses.replace(runs[0], **fields)


def _load(
    variants: Mapping[str, Variant], bench: Bench, scenarios: Sequence[Scenario], turn: Sequence[str]
) -> Iterator[Timing]:
    """Load the variants and run every scenario once on each variant."""
    for names in [[name] for name in turn] if bench.apart else [turn]:
        with contextlib.ExitStack() as stack:
            opened = (variants[name].open(variants[name].directory, bench.threads) for name in names)
            runners = {name: stack.enter_context(runner) for name, runner in zip(names, opened, strict=True)}
            for depth in dict.fromkeys(s.depth for s in scenarios):
                yield from _time_group(bench, runners, [s for s in scenarios if s.depth == depth])


def _ratios(runs: Mapping[tuple[Scenario, str], Sequence[Timing]], base: str | None) -> Iterator[PairedRatio]:
    for (scenario, name), own in runs.items():
        if name != base and (scenario, base) in runs:
            old = _joined(runs[scenario, str(base)])
            new = _joined(own)
            yield paired_ratio(old.samples_ns, new.samples_ns, new.loads)


def _time_group(bench: Bench, runners: Mapping[str, TextRunner], scenarios: Sequence[Scenario]) -> Iterator[Timing]:
    """Fill every runner to the common depth of the scenarios, then time the scenarios one after the other."""
    depth = scenarios[0].depth
    for runner in runners.values():
        runner.begin(depth + max(s.tokens for s in scenarios))
        for chunk in _chunks(bench.ids, 0, depth, _FILL_CHUNK):
            runner.append(chunk)
        bench.steps.done()
    for scenario in scenarios:
        for runner in runners.values():
            _warm_up(bench, runner, scenario)
            bench.steps.done()
        for name, runner in runners.items():
            yield _run(bench, name, runner, scenario)
            bench.steps.done()


def _run(bench: Bench, variant: str, runner: TextRunner, scenario: Scenario) -> Timing:
    """One run of a scenario on a runner whose cache holds at least the scenario's depth.

    A run that is repeated is the mean of its repetitions, and keeps the steps of all.
    """
    runner.rewind(scenario.depth)
    bench.waits.append(bench.instruments.idle())
    stamps, picks = zip(*_repeated(bench, runner, scenario, bench.instruments.least_ns), strict=True)
    if bench.instruments.clocks and (clocks := bench.instruments.clocks()):
        bench.clocks.append(clocks)
    mean: Callable[[float], tuple[int, ...]] = lambda total: (round(total / len(stamps)),)  # noqa: E731
    steps = tuple(after - start for run in stamps for start, after in itertools.pairwise(run))
    return Timing(
        scenario,
        variant,
        mean(sum(run[-1] - run[0] for run in stamps)),
        first_token_ns=mean(sum(picks)) if scenario.kind == "pp" else (),
        token_ns=(steps,) if scenario.kind == "tg" else (),
    )


def _repeated(bench: Bench, runner: TextRunner, scenario: Scenario, least_ns: int) -> Iterator[tuple[list[int], int]]:
    """Runs of a scenario until they took so long together: the clock around each step, and the time of a pick."""
    clock = bench.instruments.clock
    chunks = _run_chunks(bench, scenario, scenario.tokens)
    taken = 0
    while True:
        with _collector_paused():
            stamps = [clock()]
            for chunk in chunks:
                runner.append(chunk)
                stamps.append(clock())
            picked = 0
            if scenario.kind == "pp":
                runner.pick()
                picked = clock() - stamps[-1]
        yield stamps, picked
        taken += stamps[-1] - stamps[0] + picked
        if taken >= least_ns:
            return
        runner.rewind(scenario.depth)


def _warm_up(bench: Bench, runner: TextRunner, scenario: Scenario) -> None:
    """Run a scenario untimed, without a wait; decode runs one token, which allocates the buffers of all.

    A GPU also needs time to raise its clocks: there the whole scenario repeats (`Instruments.warm_up_ns`).
    """
    tokens = scenario.tokens if scenario.kind == "pp" else min(scenario.tokens, _WARM_UP_DECODE)
    runner.rewind(scenario.depth)
    for chunk in _run_chunks(bench, scenario, tokens):
        runner.append(chunk)
    if scenario.kind == "pp":
        runner.pick()
    if bench.instruments.warm_up_ns:
        runner.rewind(scenario.depth)
        for _ in _repeated(bench, runner, scenario, bench.instruments.warm_up_ns):
            pass


def _run_chunks(bench: Bench, scenario: Scenario, tokens: int) -> list[Any]:
    """The first tokens of a run: one chunk of a prefill, single tokens of a decode."""
    end = scenario.depth + tokens
    return _chunks(bench.ids, scenario.depth, end, tokens if scenario.kind == "pp" else 1)


def _chunks(ids_T: np.ndarray, start: int, end: int, size: int) -> list[Any]:
    """Ids start..end in chunks."""
    return [ids_T[i : min(i + size, end)] for i in range(start, end, size)]


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
