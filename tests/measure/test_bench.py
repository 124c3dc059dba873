"""bench against a decoder that computes nothing: the order of runs, the arithmetic, and the child process."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from nbl_export import child
from nbl_export.errors import NblError
from nbl_export.measure import benchmark, rounds
from nbl_export.measure.benchmark import BenchSetting, decode_tokens, plan_scenarios
from nbl_export.measure.footprint import Footprint, measure_footprint
from nbl_export.measure.instruments import Instruments, Reading, read_usage
from nbl_export.measure.rounds import Variant
from nbl_export.options.options import JobOptions
from nbl_export.records.paired import figures
from nbl_export.records.results import Scenario, Timing

pytestmark = pytest.mark.process

SETTING = BenchSetting(100, 4096, "ort")
PICK_NS = 3  # what a fake takes to pick a token


class Tape:
    """A clock that only the runners move, and everything they were asked to do, in order."""

    def __init__(self) -> None:
        self.now = 0
        self.calls: list[tuple[Any, ...]] = []

    def clock(self) -> int:
        assert not gc.isenabled(), "the collector may run inside a timing"
        self.calls.append(("clock",))
        return self.now


class FakeRunner:
    """A TextRunner that takes ns_per_token x tokens of the tape's time and refuses what no engine can do."""

    def __init__(self, tape: Tape, name: str, ns_per_token: int) -> None:
        self.tape, self.name, self.ns_per_token = tape, name, ns_per_token
        self.held: list[int] = []
        self.capacity = -1

    def __enter__(self) -> FakeRunner:
        self.tape.calls.append((self.name, "open"))
        return self

    def __exit__(self, *exc: object) -> None:
        self.tape.calls.append((self.name, "close"))

    def begin(self, max_tokens: int) -> None:
        self.held, self.capacity = [], max_tokens
        self.tape.calls.append((self.name, "begin", max_tokens))

    def append(self, ids: Sequence[int]) -> None:
        assert len(self.held) + len(ids) <= self.capacity, "the sequence outgrows what begin reserved"
        self.tape.calls.append((self.name, "append", len(self.held), [int(i) for i in ids]))
        self.held.extend(int(i) for i in ids)
        self.tape.now += self.ns_per_token * len(ids)

    def rewind(self, length: int) -> None:
        assert length <= len(self.held), "cannot rewind forwards"
        assert gc.isenabled(), "the collector was left off after a timing"
        del self.held[length:]
        self.tape.now += 1_000_000  # must not be timed
        self.tape.calls.append((self.name, "rewind", length))

    def pick(self) -> int:
        self.tape.now += PICK_NS
        return 0

    def encode(self, prompt: str, *, chat: bool) -> list[int]:
        raise AssertionError("bench has no text")

    def stream(self, ids: Sequence[int], max_new_tokens: int) -> Iterator[str]:
        raise AssertionError("bench does not sample")

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        raise AssertionError("bench does not sample")


DEVICE_BYTES = 90  # that each fake takes on a GPU


def measure_nothing(
    open_runner: object, directory: Path, threads: int | None, prompt: Sequence[int], capacity: int, _gpu: bool
) -> Footprint:
    return Footprint(peak_memory_bytes=len(prompt), steady_memory_bytes=capacity)


def measure_on_device(*given: Any) -> Footprint:
    return dataclasses.replace(measure_nothing(*given), device_memory_bytes=DEVICE_BYTES)


def run_fake(
    tmp_path: Path,
    scenarios: Sequence[Scenario],
    repetitions: int | None,
    setting: BenchSetting = SETTING,
    usage: Callable[[], Reading] = read_usage,
    held_up: Callable[[str, int], int] = lambda name, load: 0,
    idle: Callable[[int], bool] = lambda number: True,
    measure: benchmark.Measure = measure_nothing,
    **instruments: Any,
) -> tuple[dict[str, Any], Tape, list[tuple[int, int]]]:
    """bench.run on two fakes (original 20 ns a token, nbl 10), with the tape and the progress reports.

    held_up: nanoseconds that a token takes more, by name and load. idle: what the wait of that number answers.
    """
    tape, reports, opened = Tape(), [], collections.Counter[str]()

    def open_fake(path: Path, _threads: int | None) -> FakeRunner:
        opened[path.name] += 1
        more = held_up(path.name, opened[path.name] - 1)
        return FakeRunner(tape, path.name, {"original": 20, "nbl": 10}[path.name] + more)

    def wait() -> bool:
        tape.calls.append(("idle",))
        tape.now += 1_000_000  # must not be timed
        return idle(sum(call == ("idle",) for call in tape.calls))

    for name in ("original", "nbl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_bytes(b"x" * 5)
        (tmp_path / name / "model.onnx.data").write_bytes(b"x" * 7)
        (tmp_path / name / "genai_config.json").write_bytes(b"not the model")
    result = benchmark.run(
        {name: Variant(tmp_path / name, open_fake, size) for name, size in (("original", 40), ("nbl", 30))},
        scenarios,
        repetitions,
        lambda done, total: reports.append((done, total)),
        setting=setting,
        instruments=Instruments(tape.clock, wait, usage, **instruments),
        measure=measure,
    )
    return result, tape, reports


_BETWEEN = (("rewind",), ("begin",), ("close",))  # what comes after a run


def runs(tape: Tape) -> list[tuple[str, int, int]]:
    """(runner, rewound to, tokens appended while the clock ran) of every run, warm-ups included."""
    found = []
    for i, call in enumerate(tape.calls):
        if call[1:2] == ("rewind",):
            later = itertools.takewhile(lambda c: c[1:2] not in _BETWEEN, tape.calls[i + 1 :])
            found.append((call[0], call[2], sum(len(c[3]) for c in later if c[1:2] == ("append",))))
    return found


@pytest.mark.parametrize(("others", "said"), [(1e3, 1), (0.0, 0)])
def test_decoders_are_measured_by_the_options(
    others: float, said: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine is said."""
    opened: list[tuple[str, int | None]] = []
    lines: list[str] = []
    clock = itertools.count(1)

    def open_fake(path: Path, threads: int | None) -> FakeRunner:
        opened.append((path.name, threads))
        return FakeRunner(Tape(), path.name, 10)

    used = {"seconds": 1.0, "others": others, "stolen": 0.0}
    monkeypatch.setattr(rounds, "used_between", lambda before, after: used)
    monkeypatch.setattr(benchmark, "measure_footprint", measure_nothing)
    monkeypatch.setattr(benchmark, "Instruments", lambda: Instruments(clock.__next__, lambda: True))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    options = JobOptions("", prompt_tokens=(8, 16), generate_tokens=2, depths=(0,), repetitions=1)
    variants = {name: Variant(tmp_path / name, open_fake, 1) for name in ("a", "b")}
    setting = BenchSetting(100, 64, "an engine", base="a", threads=3)
    found = benchmark.side_by_side(variants, options, setting, lambda done, total: None, lines.append)
    assert opened == [("a", 3), ("b", 3)]
    tests = [(t["test"], t["variant"]) for t in found["timings"]]
    assert tests == [(t, v) for t in ("pp8", "pp16", "tg2") for v in ("a", "b")]
    assert [found[name] for name in ("engine", "base", "repetitions", "threads")] == ["an engine", "a", 1, 3]
    assert set(found["machine"]) >= {"cpu", "cores"} and "onnx" in found["versions"]
    assert len(lines) == said and all("on a busy machine: other processes used 1000 of" in line for line in lines)


def test_a_timing_is_the_same_from_its_row(tmp_path: Path) -> None:
    result, _, _ = run_fake(tmp_path, plan_scenarios((8,), 4, (0, 16)), 2)
    for row in result["timings"]:
        timing = Timing.from_json(row)
        assert timing.to_json() == row and Timing.from_json(timing.to_json()) == timing
    assert [r["loads"] for r in figures(result)["rows"]] == [[0, 1]] * len(result["timings"])


def test_no_variant_follows_itself_and_the_warm_up_is_discarded(tmp_path: Path) -> None:
    result, tape, _ = run_fake(tmp_path, [Scenario("pp", 64, 0)], repetitions=3)
    names = [name for name, _, _ in runs(tape)]
    # with each load the warm-up of each, then a round; the turn moves on with the next load
    assert names == ["original", "nbl"] * 2 + ["nbl", "original"] * 2 + ["original", "nbl"] * 2
    assert [len(t["samples_ns"]) for t in result["timings"]] == [3, 3]


@pytest.mark.parametrize("repetitions", [1, 2, 5])
def test_every_round_has_a_load_of_its_own(tmp_path: Path, repetitions: int) -> None:
    result, tape, reports = run_fake(tmp_path, plan_scenarios((64,), 4, (600, 0, 0)), repetitions)
    for name in ("original", "nbl"):
        kinds = [c[1] for c in tape.calls if c[0] == name]
        between = "".join({"open": "o", "close": "c", "rewind": "r"}.get(k, "") for k in kinds).strip("oc").split("co")
        assert len(between) == kinds.count("open") == repetitions
        assert [len(runs) for runs in between] == [4 * 2] * repetitions
    assert [len(t["samples_ns"]) for t in result["timings"]] == [repetitions] * 8
    assert [t["loads"] for t in result["timings"]] == [list(range(repetitions))] * 8
    assert [(t["test"], t["depth"], t["variant"]) for t in result["timings"]] == [
        (test, depth, name) for depth in (0, 600) for test in ("pp64", "tg4") for name in ("original", "nbl")
    ]
    assert reports[-1] == (len(reports), len(reports))


def test_rounds_go_on_while_one_interval_is_wide(tmp_path: Path) -> None:
    """Load 2 is slow for one decoder: among six loads it is an end of the range, among twelve it is not."""
    scenarios = [Scenario("pp", 64, 0), Scenario("tg", 4, 0)]
    result, _, reports = run_fake(tmp_path, scenarios, None, held_up=lambda n, load: 9 * (n == "nbl" and load == 2))
    assert [t["loads"] for t in result["timings"]] == [list(range(12))] * 4
    assert result["repetitions"] is None
    assert reports[-1] == (len(reports), len(reports))
    (tmp_path / "steady").mkdir()
    steady, _, _ = run_fake(tmp_path / "steady", scenarios, None)
    assert [t["loads"] for t in steady["timings"]] == [list(range(6))] * 4


def test_rounds_do_not_go_on_for_longer_than_the_limit(tmp_path: Path) -> None:
    def usage() -> Callable[[], Reading]:
        clock = itertools.count(0, 12)  # a load takes 12 seconds, as does what comes before the next
        return lambda: Reading(next(clock), 0, 0, 0)

    uneven = lambda name, load: 9 * (name == "nbl") * (load % 2)  # noqa: E731
    result, _, _ = run_fake(tmp_path, [Scenario("pp", 64, 0)], None, usage=usage(), held_up=uneven)
    assert [len(t["loads"]) for t in result["timings"]] == [12, 12]  # 144 of 180 seconds


def test_what_others_used_is_recorded_by_load(tmp_path: Path) -> None:
    """Two loads of ten seconds on one core more than this process' own; one wait of eight was in vain."""
    readings = iter([
        Reading(0, 100, 50, 0), Reading(10, 112, 60, 0),
        Reading(11, 200, 61, 0), Reading(21, 218, 71, 1),
    ])  # fmt: skip
    result, _, _ = run_fake(
        tmp_path, [Scenario("pp", 64, 0), Scenario("tg", 4, 0)], 2, usage=lambda: next(readings), idle=lambda n: n != 3
    )
    found = result["background"]
    assert (found["others"], found["stolen"]) == pytest.approx((0.5, 0.05))
    assert (found["waits"], found["gave_up"]) == (8, 1)


def test_a_timed_run_waits_for_an_idle_machine_and_a_warm_up_does_not(tmp_path: Path) -> None:
    _, tape, _ = run_fake(tmp_path, [Scenario("pp", 64, 0), Scenario("tg", 4, 0)], repetitions=2)
    started = [i for i, call in enumerate(tape.calls) if call[1:2] == ("rewind",)]
    assert len(started) == 2 * 2 * 4
    following = [tuple(c[-1] for c in tape.calls[i + 1 : i + 3]) for i in started]
    waited = [pair == ("idle", "clock") for pair in following]
    assert waited == [False, False, True, True] * 4  # the warm-ups of both, then the runs of both
    assert sum(call == ("idle",) for call in tape.calls) == sum(waited)
    clocks = [i for i, call in enumerate(tape.calls) if call == ("clock",)]
    timed = [i for i, waits in zip(started, waited, strict=True) if waits]
    assert all(any(i < clock for i in timed) for clock in clocks)
    assert not any(c == ("clock",) for i in started if i not in timed for c in tape.calls[i + 1 : i + 3])


def test_every_token_and_the_first_pick_have_their_own_time(tmp_path: Path) -> None:
    """Of the timed tokens alone: neither the fill nor a rewind is in them."""
    result, tape, _ = run_fake(tmp_path, [Scenario("pp", 64, 1000), Scenario("tg", 16, 1000)], repetitions=2)
    prefill, decode = ({t["variant"]: t for t in result["timings"] if t["kind"] == kind} for kind in ("pp", "tg"))
    assert prefill["original"]["first_token_ns"] == [PICK_NS] * 2
    assert prefill["original"]["samples_ns"] == [64 * 20] * 2  # the pick is not in it
    assert [decode[name]["samples_ns"] for name in ("original", "nbl")] == [[16 * 20] * 2, [16 * 10] * 2]
    sizes = [len(c[3]) for c in tape.calls if c[:2] == ("nbl", "append") and c[2] >= 1000]
    assert sizes == [64, 64, 1, *[1] * 16] * 2  # warm-up, round; decode's warm-up is shorter
    assert decode["nbl"]["token_ns"] == [[10] * 16] * 2
    assert "token_ns" not in prefill["nbl"] and "first_token_ns" not in decode["nbl"]


def test_a_depth_is_filled_once_and_every_run_rewinds_to_it(tmp_path: Path) -> None:
    scenarios = [Scenario("pp", 64, 1300), Scenario("tg", 16, 1300)]
    _, tape, _ = run_fake(tmp_path, scenarios, repetitions=1)
    first_run = next(i for i, c in enumerate(tape.calls) if c[1:2] == ("rewind",))
    fills = [c for c in tape.calls if c[1:2] == ("append",) and c[2] < 1300]
    assert [(c[0], c[2], len(c[3])) for c in fills] == [
        (name, start, size) for name in ("original", "nbl") for start, size in ((0, 512), (512, 512), (1024, 276))
    ]
    assert all(tape.calls.index(c) < first_run for c in fills)
    assert {depth for _, depth, _ in runs(tape)} == {1300}


def test_both_variants_see_the_same_ids_below_the_vocabulary(tmp_path: Path) -> None:
    _, tape, _ = run_fake(tmp_path, plan_scenarios((32,), 8, (0, 600)), repetitions=2)
    seen: dict[str, dict[int, set[int]]] = {"original": {}, "nbl": {}}
    for name, kind, *rest in (c for c in tape.calls if len(c) == 4):
        assert kind == "append"
        for position, token in enumerate(rest[1], start=rest[0]):
            seen[name].setdefault(position, set()).add(token)
    assert seen["original"] == seen["nbl"]
    assert all(len(tokens) == 1 for tokens in seen["nbl"].values()), "an id depends on the round"
    values = {token for tokens in seen["nbl"].values() for token in tokens}
    assert min(values) >= 0 and max(values) < SETTING.vocab_size and len(values) > 50


def test_a_scenario_beyond_the_context_is_named_and_left_out(tmp_path: Path) -> None:
    small = BenchSetting(100, 1024, "ort")
    result, _, _ = run_fake(tmp_path, [Scenario("pp", 24, 1000), Scenario("tg", 25, 1000)], 1, small)
    assert {t["test"] for t in result["timings"]} == {"pp24"}
    (row,) = result["skipped"]
    assert (row["test"], row["depth"]) == ("tg25", 1000)
    assert "1024" in row["reason"]


def test_nothing_that_fits_is_an_error_before_anything_is_loaded() -> None:
    small = BenchSetting(100, 64, "ort")
    variant = Variant(Path("nowhere"), lambda *_: pytest.fail("loaded"), 1)
    with pytest.raises(NblError, match=r"65 tokens .* context length of the model, 64"):
        benchmark.run({"nbl": variant}, [Scenario("pp", 65, 0)], 1, lambda *_: None, setting=small)


def test_what_is_recorded(tmp_path: Path) -> None:
    result, _, _ = run_fake(tmp_path, plan_scenarios((16, 32), 8, (0, 600)), repetitions=2)
    assert result["variants"]["nbl"] == {
        "peak_memory_bytes": 32,  # the largest prompt
        "steady_memory_bytes": 632,
        "kv_cache_bytes": 30 * 632,
        "kv_cache_bytes_per_token": 30,
        "model_bytes": 12,
    }
    assert set(result["machine"]) == {"cpu", "cores", "memory_bytes", "os", "python"}
    facts = [result[name] for name in ("threads", "engine", "provider", "repetitions", "base")]
    assert facts == [None, "ort", "cpu", 2, "original"]
    common = {"test", "kind", "tokens", "depth", "variant", "samples_ns", "loads"}
    assert result["timings"][0].keys() == common | {"first_token_ns"}
    assert result["timings"][4].keys() == common | {"token_ns"}


@pytest.mark.parametrize(
    ("on_gpu", "free", "apart"), [(True, 200, False), (True, 199, True), (True, None, False), (False, 1, False)]
)
def test_engines_on_a_gpu_are_judged_by_its_memory(
    on_gpu: bool, free: int | None, apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two engines of 90 bytes; the memory of the machine has room for all."""
    monkeypatch.setattr(benchmark, "free_bytes", lambda: free)
    monkeypatch.setattr(benchmark, "describe", lambda: {"name": "NVIDIA L4"})
    monkeypatch.setattr(benchmark, "read_clocks", lambda: {"driver": "580.65.06", "sm_mhz": 210})
    setting = dataclasses.replace(SETTING, gpu=on_gpu)
    result, _, _ = run_fake(tmp_path, plan_scenarios((32,), 8, (0,)), 2, setting, measure=measure_on_device)
    assert result["apart"] is apart
    assert result["variants"]["nbl"]["device_memory_bytes"] == DEVICE_BYTES
    if on_gpu:
        assert result["machine"]["gpu"] == {"name": "NVIDIA L4", "driver": "580.65.06"}
    else:
        assert "gpu" not in result["machine"]


def test_a_gpu_is_warm_and_a_short_test_is_repeated(tmp_path: Path) -> None:
    """The original takes 20 ns a token, NBL 10: a warm-up of 500 ns, and at least 1,000 ns of each timed test."""
    scenarios = [Scenario("pp", 8, 0), Scenario("tg", 4, 0)]
    result, tape, _ = run_fake(tmp_path, scenarios, 2, warm_up_ns=500, least_ns=1000)
    assert collections.Counter(runs(tape)) == {
        ("original", 0, 8): 2 * (1 + 4 + 7), ("nbl", 0, 8): 2 * (1 + 7 + 13),  # a run takes 163 and 83 ns, with a pick
        ("original", 0, 1): 2, ("original", 0, 4): 2 * (7 + 13), ("nbl", 0, 1): 2, ("nbl", 0, 4): 2 * (13 + 25),
    }  # fmt: skip
    rows = {(t["test"], t["variant"]): t for t in result["timings"]}
    assert rows["pp8", "original"]["samples_ns"] == [160] * 2 and rows["tg4", "nbl"]["samples_ns"] == [40] * 2
    assert rows["pp8", "nbl"]["first_token_ns"] == [PICK_NS] * 2
    assert rows["tg4", "nbl"]["token_ns"] == [[10] * 4 * 25] * 2


@pytest.mark.parametrize("gpu", [True, False])
def test_only_a_gpu_is_warmed_up_by_time(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(benchmark, "run", lambda *_, **more: asked.update(more) or {"background": {"busy": False}})
    tests = JobOptions("", generate_tokens=2)
    benchmark.side_by_side({}, tests, BenchSetting(100, 64, "an engine", gpu=gpu), lambda *_: None, print)
    used = asked["instruments"]
    assert (used.warm_up_ns, used.least_ns) == ((500_000_000, 1_000_000_000) if gpu else (0, 0))
    assert used.clocks is (benchmark.read_clocks if gpu else None)


def test_clocks_are_read_right_behind_each_timed_run(tmp_path: Path) -> None:
    seen = iter([{"sm_mhz": 1980, "slowed_by": []}, {"sm_mhz": 1410, "slowed_by": ["power limit"]}, None, {}])
    result, _, _ = run_fake(tmp_path, [Scenario("pp", 64, 0)], 2, clocks=lambda: next(seen))
    assert result["gpu_clocks"] == {"runs": 2, "sm_mhz": [1410, 1980], "slowed_by": {"power limit": 1}}
    assert next(seen, "read once a run") == "read once a run"


def test_variants_are_loaded_one_after_the_other_if_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = 2 * 32  # bytes: the fakes take one a token of the prompt
    for available, apart in ((peaks * 10 // 9 + 1, False), (peaks, True)):
        monkeypatch.setattr(benchmark, "available_bytes", lambda available=available: available)
        result, tape, reports = run_fake(tmp_path, plan_scenarios((32,), 8, (0,)), repetitions=2)
        loads = [call for call in tape.calls if call[1:] in (("open",), ("close",))]
        together, alone = ["open", "open", "close", "close"], ["open", "close"] * 2
        assert [call[1] for call in loads] == 2 * (alone if apart else together)
        assert [name for name, what in loads if what == "open"] == ["original", "nbl", "nbl", "original"]
        assert result["apart"] is apart
        assert {len(t["samples_ns"]) for t in result["timings"]} == {2}
        assert reports[-1][0] == reports[-1][1]
        for folder in ("original", "nbl"):
            shutil.rmtree(tmp_path / folder)


def test_a_large_model_decodes_fewer_tokens_on_a_cpu(tmp_path: Path) -> None:
    def length(gigabytes: float, asked: int | None = None, *, gpu: bool = False) -> int:
        for name, share in (("original", 1.0), ("nbl", 0.9)):
            (tmp_path / name).mkdir(exist_ok=True)
            with (tmp_path / name / "model.onnx.data").open("wb") as file:
                file.truncate(int(share * gigabytes * 2**30))  # sparse: takes no disk
        return decode_tokens(asked, [tmp_path / "nbl", tmp_path / "original"], gpu=gpu)

    assert [length(g) for g in (0.5, 0.625, 0.63, 1.25, 2, 2.5, 6, 30)] == [128, 128, 64, 64, 32, 32, 16, 16]
    assert length(6, asked=100) == 100
    assert length(6, gpu=True) == 128


# -- the child process ---------------------------------------------------------------------------------


class HungryRunner(FakeRunner):
    """Holds 200 MB from begin to rewind; sleeps, dies or fails instead when told to."""

    def __init__(self, directory: Path, threads: int | None, behaviour: str = "") -> None:
        assert threads == 2
        super().__init__(Tape(), directory.name, 0)
        time.sleep(30 if behaviour == "sleep" else 0.05)
        if behaviour == "die":
            os._exit(7)
        if behaviour == "fail":
            raise NblError(f"{directory} is broken")
        if behaviour == "defect":
            raise RuntimeError("Error in set optimization profile async.")
        if behaviour == "memory":
            raise MemoryError
        if behaviour in ("SIGSEGV", "SIGKILL"):
            os.kill(os.getpid(), signal.Signals[behaviour])

    def begin(self, max_tokens: int) -> None:
        super().begin(max_tokens)
        self.cache = bytearray(os.urandom(1) * 200_000_000)


def footprint(behaviour: str = "") -> Footprint:
    open_runner = functools.partial(HungryRunner, behaviour=behaviour)
    return measure_footprint(open_runner, Path("decoder"), 2, [1, 2, 3], 16)


def test_the_footprint_is_the_childs_own() -> None:
    ballast = bytearray(os.urandom(1) * 700_000_000)  # the child must not inherit this figure
    seen = footprint()
    del ballast
    assert 200_000_000 < seen.peak_memory_bytes < 650_000_000
    assert 200_000_000 < seen.steady_memory_bytes <= seen.peak_memory_bytes


@pytest.mark.parametrize(
    ("behaviour", "sentence"),
    [
        ("fail", "^decoder is broken$"),
        ("defect", "measuring decoder failed .* RuntimeError: Error in set optimization profile async.$"),
        ("memory", "measuring decoder needs more memory: "),
        ("die", "status 7$"),
        ("SIGSEGV", r"status -11 \(SIGSEGV, a crash in a library"),
        ("SIGKILL", r"status -9 \(SIGKILL, usually too little memory"),
    ],
)
def test_a_child_that_fails_is_one_sentence(behaviour: str, sentence: str) -> None:
    with pytest.raises(NblError, match=sentence):
        footprint(behaviour)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows starts processes in another way")
def test_ctrl_c_while_the_child_starts_leaves_no_child() -> None:
    """In a process of its own, because a signal of a thread can end the worker that runs the tests."""
    code = f"from {__name__} import interrupt_the_start; interrupt_the_start()"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "no child\n"), done.stderr


def interrupt_the_start() -> None:
    """A thread of a library takes the signal, in which it is not blocked; the child would outlive this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started: list[psutil.Process] = []

    def take() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            started.append(psutil.Process(self.pid))
            thread = threading.Thread(target=take)
            thread.start()
            thread.join()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child.subprocess, "Popen", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            footprint("sleep")
    assert len(started) == 1 and not started[0].is_running()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    sys.stdout.write("no child\n")


def test_a_child_that_ends_during_ctrl_c_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It has its answer while this process, which no longer waits for answers, goes to end it."""
    terminate = subprocess.Popen.terminate

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def late(self: subprocess.Popen[bytes]) -> None:
        self.wait(60)
        terminate(self)

    monkeypatch.setattr(child.Child, "answer", interrupt)
    monkeypatch.setattr(subprocess.Popen, "terminate", late)
    with pytest.raises(KeyboardInterrupt):
        footprint()
    assert capfd.readouterr().err == ""
