"""bench against a decoder that computes nothing: the order of runs, the arithmetic, and the child process."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from nbl_export import bench
from nbl_export.bench import BenchSetting, Footprint, plan_scenarios
from nbl_export.errors import NblError
from nbl_export.records import Scenario

SETTING = BenchSetting(
    vocab_size=100,
    context_length=4096,
    threads=2,
    cache_bytes_per_token={"original": 40, "nbl": 30},
    versions={"onnxruntime": "1"},
)


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

    def encode(self, prompt: str, *, chat: bool) -> list[int]:
        raise AssertionError("bench has no text")

    def stream(self, ids: Sequence[int], max_new_tokens: int) -> Iterator[str]:
        raise AssertionError("bench does not sample")

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        raise AssertionError("bench does not sample")


def measure_nothing(open_runner: object, directory: Path, prompt: Sequence[int], capacity: int) -> Footprint:
    return Footprint(peak_memory_bytes=len(prompt), steady_memory_bytes=capacity, load_seconds=0.5)


def run_fake(
    tmp_path: Path, scenarios: Sequence[Scenario], repetitions: int, setting: BenchSetting = SETTING
) -> tuple[dict[str, Any], Tape, list[tuple[int, int]]]:
    """bench.run on two fakes (original 20 ns a token, nbl 10), with the tape and the progress reports."""
    tape, reports = Tape(), []
    for name in ("original", "nbl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_bytes(b"x" * 5)
        (tmp_path / name / "model.onnx.data").write_bytes(b"x" * 7)
        (tmp_path / name / "genai_config.json").write_bytes(b"not the model")
    result = bench.run(
        {name: tmp_path / name for name in ("original", "nbl")},
        scenarios,
        repetitions,
        lambda path: FakeRunner(tape, path.name, {"original": 20, "nbl": 10}[path.name]),
        lambda done, total: reports.append((done, total)),
        setting=setting,
        clock=tape.clock,
        measure=measure_nothing,
    )
    return result, tape, reports


def runs(tape: Tape) -> list[tuple[str, int, int]]:
    """(runner, rewound to, tokens appended while the clock ran) of every run, warm-ups included."""
    found = []
    for i, call in enumerate(tape.calls):
        if call[1:2] == ("rewind",):
            stop = tape.calls.index(("clock",), i + 2)
            found.append((call[0], call[2], sum(len(c[3]) for c in tape.calls[i + 2 : stop])))
    return found


def test_rounds_alternate_and_the_warm_up_is_discarded(tmp_path: Path) -> None:
    result, tape, _ = run_fake(tmp_path, [Scenario("pp", 64, 0)], repetitions=3)
    names = [name for name, _, _ in runs(tape)]
    # the warm-up of each, then three rounds
    assert names == ["original", "nbl", "original", "nbl", "nbl", "original", "original", "nbl"]
    assert [len(t["samples_ns"]) for t in result["timings"]] == [3, 3]


def test_a_prefill_is_one_chunk_and_a_decode_single_tokens(tmp_path: Path) -> None:
    _, tape, _ = run_fake(tmp_path, [Scenario("pp", 64, 0), Scenario("tg", 16, 0)], repetitions=1)
    sizes = [len(c[3]) for c in tape.calls if c[:2] == ("nbl", "append")]
    assert sizes == [64, 64] + [1] * 8 + [1] * 16  # warm-up, round; decode's warm-up is shorter


def test_time_is_that_of_the_timed_tokens_alone(tmp_path: Path) -> None:
    result, _, _ = run_fake(tmp_path, [Scenario("pp", 64, 1000), Scenario("tg", 16, 1000)], repetitions=2)
    samples = {(t["test"], t["variant"]): t["samples_ns"] for t in result["timings"]}
    assert samples == {
        ("pp64", "original"): [64 * 20] * 2,
        ("pp64", "nbl"): [64 * 10] * 2,
        ("tg16", "original"): [16 * 20] * 2,
        ("tg16", "nbl"): [16 * 10] * 2,
    }


def test_a_depth_is_filled_once_and_every_run_rewinds_to_it(tmp_path: Path) -> None:
    scenarios = [Scenario("pp", 64, 1300), Scenario("tg", 16, 1300)]
    _, tape, _ = run_fake(tmp_path, scenarios, repetitions=2)
    first_run = next(i for i, c in enumerate(tape.calls) if c[1:2] == ("rewind",))
    fills = [c for c in tape.calls if c[1:2] == ("append",) and c[2] < 1300]
    assert [(c[0], c[2], len(c[3])) for c in fills] == [
        (name, start, size) for name in ("original", "nbl") for start, size in ((0, 512), (512, 512), (1024, 276))
    ]
    assert all(tape.calls.index(c) < first_run for c in fills)
    assert {depth for _, depth, _ in runs(tape)} == {1300}


def test_both_variants_see_the_same_ids_below_the_vocabulary(tmp_path: Path) -> None:
    _, tape, _ = run_fake(tmp_path, plan_scenarios(32, 8, (0, 600)), repetitions=2)
    seen: dict[str, dict[int, set[int]]] = {"original": {}, "nbl": {}}
    for name, kind, *rest in (c for c in tape.calls if len(c) == 4):
        assert kind == "append"
        for position, token in enumerate(rest[1], start=rest[0]):
            seen[name].setdefault(position, set()).add(token)
    assert seen["original"] == seen["nbl"]
    assert all(len(tokens) == 1 for tokens in seen["nbl"].values()), "an id depends on the round"
    values = {token for tokens in seen["nbl"].values() for token in tokens}
    assert min(values) >= 0 and max(values) < SETTING.vocab_size and len(values) > 50


def test_the_plan_of_scenarios() -> None:
    tests = [(s.test, s.depth) for s in plan_scenarios(512, 128, (2048, 0, 0))]
    assert tests == [("pp512", 0), ("tg128", 0), ("pp512", 2048), ("tg128", 2048)]


def test_a_scenario_beyond_the_context_is_named_and_left_out(tmp_path: Path) -> None:
    small = BenchSetting(100, 1024, 2, SETTING.cache_bytes_per_token, {})
    result, _, _ = run_fake(tmp_path, [Scenario("pp", 24, 1000), Scenario("tg", 25, 1000)], 1, small)
    assert {t["test"] for t in result["timings"]} == {"pp24"}
    (row,) = result["skipped"]
    assert (row["test"], row["depth"]) == ("tg25", 1000)
    assert "1024" in row["reason"]


def test_nothing_that_fits_is_an_error_before_anything_is_loaded() -> None:
    small = BenchSetting(100, 64, 2, SETTING.cache_bytes_per_token, {})
    with pytest.raises(NblError, match="64 tokens"):
        bench.run({}, [Scenario("pp", 65, 0)], 1, lambda path: pytest.fail("loaded"), lambda *_: None, setting=small)


def test_what_is_recorded(tmp_path: Path) -> None:
    result, _, _ = run_fake(tmp_path, plan_scenarios(32, 8, (0, 600)), repetitions=2)
    assert result["variants"]["nbl"] == {
        "peak_memory_bytes": 32,  # the largest prompt
        "steady_memory_bytes": 632,
        "load_seconds": 0.5,
        "kv_cache_bytes": 30 * 632,
        "kv_cache_bytes_per_token": 30,
        "model_bytes": 12,
    }
    assert set(result["machine"]) == {"cpu", "cores", "memory_bytes", "os", "python"}
    assert (result["threads"], result["engine"], result["provider"], result["repetitions"]) == (2, "ort", "cpu", 2)
    assert result["timings"][0].keys() == {"test", "kind", "tokens", "depth", "variant", "samples_ns"}


def test_progress_ends_at_its_total_and_runners_are_closed(tmp_path: Path) -> None:
    _, tape, reports = run_fake(tmp_path, plan_scenarios(32, 8, (0, 600)), repetitions=2)
    assert [done for done, _ in reports] == list(range(1, len(reports) + 1))
    assert {total for _, total in reports} == {len(reports)}
    assert tape.calls[-2:] == [("nbl", "close"), ("original", "close")]
    assert gc.isenabled()


# -- the child process ---------------------------------------------------------------------------------


class HungryRunner(FakeRunner):
    """Holds 200 MB from begin to rewind; sleeps, dies or fails instead when told to."""

    def __init__(self, directory: Path, behaviour: str = "") -> None:
        super().__init__(Tape(), directory.name, 0)
        time.sleep(30 if behaviour == "sleep" else 0.05)
        if behaviour == "die":
            os._exit(7)
        if behaviour == "fail":
            raise NblError(f"{directory} is broken")

    def begin(self, max_tokens: int) -> None:
        super().begin(max_tokens)
        self.cache = bytearray(os.urandom(1) * 200_000_000)


def footprint(behaviour: str = "") -> Footprint:
    open_runner = functools.partial(HungryRunner, behaviour=behaviour)
    return bench.measure_footprint(open_runner, Path("decoder"), [1, 2, 3], 16)


def test_the_footprint_is_the_childs_own() -> None:
    ballast = bytearray(os.urandom(1) * 700_000_000)  # the child must not inherit this figure
    seen = footprint()
    del ballast
    assert 200_000_000 < seen.peak_memory_bytes < 650_000_000
    assert 200_000_000 < seen.steady_memory_bytes <= seen.peak_memory_bytes
    assert 0.05 <= seen.load_seconds < 5


@pytest.mark.parametrize(("behaviour", "sentence"), [("fail", "decoder is broken"), ("die", "status 7")])
def test_a_child_that_fails_is_one_sentence(behaviour: str, sentence: str) -> None:
    with pytest.raises(NblError, match=sentence):
        footprint(behaviour)


def test_ctrl_c_leaves_no_child() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    start = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.5)
        with pytest.raises(KeyboardInterrupt):
            footprint("sleep")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < 15
    assert not multiprocessing.active_children()
