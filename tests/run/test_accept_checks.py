"""The checks of `accept` on a stand-in of TensorRT that executes the run's own graph: each planted fault is named.

Expected values are those of torch. `tests.fake_engine.StandIn` says what the faults are.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.child import Child
from nbl_export.errors import CorruptError, NblError
from nbl_export.graph.cut_reference import CutDecoder
from nbl_export.mixers.base import Running
from nbl_export.model.checkpoint.load import load_model
from nbl_export.model.linearize import linearize
from nbl_export.records.results import CheckResult
from nbl_export.run import accept as accepting
from nbl_export.targets import load_engine
from nbl_export.targets.tensorrt.static.host import CheckedRunner
from nbl_export.verify import ladder, on_target
from nbl_export.verify.exporter import row_logits
from nbl_export.verify.ladder import ON_GPU, Probe, Reference, shown_positions
from nbl_export.verify.on_target import POSITIONS, Expected, expect, load, save

from ..cuts import predicted_maps
from ..fake_engine import StandIn
from ..static_tiny import HEAD, HIDDEN, LAYERS, SLOTS, maps_of, open_decoder, rows
from ..trt_tiny import checkpoint_of, graph_of

pytestmark = pytest.mark.trt


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What verification leaves: torch's logits of two short rows and of a row that fills the slots, and its text."""
    first, second = rows()
    probe = Probe((tuple(first[:56]), tuple(second[:41])), (tuple(first[20:44]),), 12, tuple(first))
    found = {}
    for subject, maps in (("original", {}), ("nbl", maps_of([1]))):
        model, text = linearize(load_model(checkpoint_of("llama")), maps), list(probe.prompts[0])
        for _ in range(probe.new_tokens):
            text.append(int(row_logits(model, text)[-1].argmax()))
        after = row_logits(model, text)[len(probe.prompts[0]) - 1 : -1]
        margins = np.sort(after, 1)[:, -1] - np.sort(after, 1)[:, -2]
        logits, long = tuple(row_logits(model, row) for row in probe.rows), row_logits(model, probe.long)
        shown = long[shown_positions(len(probe.long))]
        said = tuple(text[len(probe.prompts[0]) :])
        found[subject] = Reference(logits, shown, (said,), (tuple(map(float, margins)),))
    path = tmp_path_factory.mktemp("values") / "acceptance.safetensors"
    save(expect("fp16", probe, found), path)
    return path


@pytest.mark.parametrize("near", [8, 20])
def test_a_cut_is_compared_in_the_steps_of_its_reference(near: int) -> None:
    """The cached steps of `last_token` climb whole, which one chunk of them does not if W is small."""
    directory = graph_of("llama", (), "fp32", cut=(1, near))
    first, second = (row[: n + ladder.DECODE_STEPS] for row, n in zip(rows(), (near + 25, near + 2), strict=True))
    probe = Probe((tuple(first), tuple(second)), (tuple(rows()[0][: near + 24]),), 8, ())
    mixers = Running(predicted_maps(1, near, 2 * HEAD, HIDDEN, LAYERS))
    decoder = CutDecoder(directory.parent / "original", HEAD, mixers, "residual")
    texts, margins = zip(*(ladder.greedy(decoder, prompt, probe.new_tokens) for prompt in probe.prompts), strict=True)
    logits = tuple(ladder.run_rows(decoder, [row])[0] for row in probe.rows)
    expected = expect("fp32", probe, {"nbl": Reference(logits, None, texts, margins)}, near)
    with CheckedRunner(open_decoder(directory / "decoder.onnx"), directory) as runner:
        found = list(on_target.checks(runner, "nbl", expected, lambda *_: None))
        steps = dataclasses.replace(expected, near=None)
        other = on_target._chunk_behind_cache(runner, "nbl", steps, lambda *_: None)
    assert [r for r in found if not r.passed and r.check != "clock"] == []
    assert not other.passed


def checked(values: Path, fault: str = "") -> list[Any]:
    """The events of the NBL graph, in this process."""
    events: list[Any] = []
    before = list(logging.getLogger().handlers)
    find = functools.partial(StandIn, fault)
    accepting.examine(events.append, find, "nbl", graph_of("llama", (1,)), values)  # type: ignore[arg-type]
    logging.getLogger().handlers[:] = before
    assert events[-1] == [accepting.FINISHED]
    return events


def results(events: list[Any]) -> list[dict[str, Any]]:
    return [event[1] for event in events if event[0] == accepting.RESULT]


# -- expected values ---------------------------------------------------------------------------------------------


def test_values_come_back_as_they_were(values: Path, tmp_path: Path) -> None:
    found = load(values)
    assert (found.precision, found.tolerance) == ("fp16", ON_GPU["fp16"])
    assert [len(row) for row in found.rows] == [56, 41, SLOTS]
    shapes = {found.logits(subject, k)[0].shape for subject in ("original", "nbl") for k in range(3)}
    assert shapes == {(POSITIONS, 144)}
    assert not found.logits("nbl", 0)[1].argmax(1).any()  # the likeliest token comes first
    save(found, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == values.read_bytes()
    assert values.stat().st_size < 200_000


def without(name: str, found: Expected) -> Expected:
    return dataclasses.replace(found, arrays={k: v for k, v in found.arrays.items() if k != name})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda found: dataclasses.replace(found, precision="fp9"), "'fp9'"),
        (lambda found: dataclasses.replace(found, rows=()), "it has no rows"),
        (lambda found: dataclasses.replace(found, rows=(*found.rows[:2], (1, 2))), "row 2 of original does not fit"),
        (lambda found: dataclasses.replace(found, prompts=()), None),
        (functools.partial(without, "nbl.logits.1"), "'nbl.logits.1'"),
        (functools.partial(without, "nbl.greedy"), "'nbl.greedy'"),
    ],
)
def test_values_that_do_not_fit_are_refused(change: Any, reason: str | None, values: Path, tmp_path: Path) -> None:
    save(change(load(values)), tmp_path / "a.safetensors")
    if reason is None:
        assert load(tmp_path / "a.safetensors").prompts == ()
        return
    with pytest.raises(CorruptError, match=rf"a\.safetensors cannot be read \({reason}.*verify again where"):
        load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("stated", ["no JSON", "[]", '{"schema": 9}', '{"schema": 2}'])
def test_a_file_of_other_values_is_refused(stated: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"rows.0": np.ones(20, np.int32)}, tmp_path / "a.safetensors", metadata={"acceptance": stated})
    with pytest.raises(CorruptError, match=r"a\.safetensors cannot be read"):
        load(tmp_path / "a.safetensors")


def test_a_cut_file_and_a_missing_file_are_refused(values: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(values.read_bytes()[:5000])
    with pytest.raises(CorruptError, match=r"cut.safetensors cannot be read"):
        load(tmp_path / "cut.safetensors")
    with pytest.raises(NblError, match="is missing, which verification leaves for engines of a GPU: copy it"):
        load(tmp_path / "none.safetensors")


# -- checks --------------------------------------------------------------------------------------------------------


def test_every_check_passes(values: Path) -> None:
    found = results(checked(values))
    assert [result["check"] for result in found] == ["structure", *["nbl"] * 7, "last_token", "text", "clock"]
    assert [result for result in found if not result["passed"]] == []
    assert found[0]["detail"].endswith("runs on a stand-in")
    (best,) = [result for result in found if "likeliest" in result["metric"]]
    assert (best["value"], best["tolerance"]) == (0.0, 0.1) and "likeliest tokens are the reference's" in best["detail"]
    logits = [result for result in found if "logit difference" in result["metric"]]
    assert all(0 < result["value"] < result["tolerance"] == 0.02 for result in logits)  # fp16 rounds
    assert "96 tokens" in logits[5]["detail"] and "decode" in logits[5]["metric"]


FAULTS = {
    "other graph": ("nbl", "relative rms logit difference, prefill", "one sequence of 56 tokens"),
    "late decode": ("nbl", "relative rms logit difference, decode", "one sequence of 96 tokens"),
    "nan": ("nbl", "relative rms logit difference, prefill", "one sequence of 56 tokens"),
    "chunks": ("last_token", "chunk behind a cache", "chunks of 20, 20, 16 tokens"),
    "leak": ("last_token", "chunk behind a cache", "on slots of another text"),
    "early clock": ("clock", "reading its token takes", "reading its token afterwards"),
    "memory": ("nbl", "comes to its end", "MemoryError:  (while running one sequence of 56 tokens)"),
    "close": ("structure", "comes to its end", "cudaFree: cudaErrorInvalidValue (while closing the decoder nbl)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_by_its_check(fault: str, values: Path) -> None:
    check, metric, detail = FAULTS[fault]
    failed = [result for result in results(checked(values, fault)) if not result["passed"]]
    assert failed and failed[0]["check"] == check, failed
    assert metric in failed[0]["metric"] and detail in failed[0]["detail"], failed[0]
    if fault not in ("other graph", "nan", "late decode"):
        assert len(failed) == 1, failed


def test_the_nbl_engine_may_be_twice_as_far_as_the_original(values: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault within the limit of the precision shows beside the original's own distance."""
    far = max(r["value"] for r in results(checked(values)) if r["check"] == "nbl" and "logit" in r["metric"])
    for yardstick, passed in ((0.51 * far, True), (0.49 * far, False)):
        events: list[Any] = []
        accepting.examine(events.append, StandIn, "nbl", graph_of("llama", (1,)), values, yardstick)  # type: ignore[arg-type]
        found = [r for r in results(events) if r["check"] == "nbl" and "logit" in r["metric"]]
        assert all(r["passed"] for r in found) is passed
        assert {r["tolerance"] for r in found} == {2 * yardstick}
    metric = "relative rms logit difference, decode"
    found = [
        dataclasses.asdict(CheckResult(check, "original", name, value, 1.0, False))
        for check, name, value in (
            ("original", metric, 0.1), ("original", metric, 0.3), ("original", metric, math.nan),
            ("last_token", metric, 9.0),
        )
    ]  # fmt: skip
    assert accepting._yardstick(found) == 0.3 and accepting._yardstick(found[2:]) is None


def test_another_likeliest_token_counts_where_torch_is_sure() -> None:
    """At most a tenth may be others, however near the logits are."""
    reference = np.array([[3.0, 0.0], [0.1, 0.0], [0.0, 3.0]])
    assert list(on_target._keeps_best(reference[:, ::-1], reference, 0.5)) == [False, False]
    assert list(on_target._keeps_best(reference, reference, 0.05)) == [True, True, True]
    for wrong, passed in ((0, True), (1, True), (2, False)):
        result = on_target._best_tokens("nbl", "nbl", np.arange(10) >= wrong)
        assert result.passed is passed and result.value == pytest.approx(wrong / 10)


def test_other_text_fails_where_torch_is_sure(values: Path, tmp_path: Path) -> None:
    assert all(result["passed"] for result in results(checked(values, "other text")))
    found = load(values)
    sure = {name: np.ones_like(array) for name, array in found.arrays.items() if name.endswith("margins")}
    save(dataclasses.replace(found, arrays={**found.arrays, **sure}), tmp_path / "sure.safetensors")
    assert all(result["passed"] for result in results(checked(tmp_path / "sure.safetensors")))
    (failed,) = [r for r in results(checked(tmp_path / "sure.safetensors", "other text")) if not r["passed"]]
    assert (failed["check"], failed["value"], failed["tolerance"]) == ("text", 1.0, 0.5)
    assert "tokens the same up to the first difference" in failed["detail"]


def test_an_engine_that_does_not_fit_cannot_run(values: Path) -> None:
    events = checked(values, "other version")
    (said,) = [event[1] for event in events if event[0] == accepting.CANNOT_RUN]
    assert "was built by tensorrt 1.2.3, and 1.2.4 is installed, which does not take it" in said
    assert results(events) == []


# -- the process of its own ----------------------------------------------------------------------------------------


def apart(values: Path, fault: str, seconds: float) -> list[Any]:
    find = functools.partial(StandIn, fault)
    return list(accepting.examined(find, "nbl", graph_of("llama", (1,)), values, seconds=seconds))  # type: ignore[arg-type]


def test_a_crash_is_a_failed_check(values: Path) -> None:
    events = apart(values, "crash", 300)
    first, crashed = results(events)
    assert first["passed"] and (crashed["check"], crashed["passed"]) == ("nbl", False)
    assert "ended with status -6 (SIGABRT, a crash in a library" in crashed["detail"]
    assert crashed["detail"].endswith("while running one sequence of 56 tokens")
    assert events[-1] == [accepting.FINISHED]


def test_another_process_finds_the_engine_of_a_run(values: Path, tmp_path: Path) -> None:
    """As `accept` names it, without a stand-in: nothing runs in an empty directory, with or without a GPU."""
    find = functools.partial(load_engine, "trt-rtx", "cpu")
    first, last = accepting.examined(find, "nbl", tmp_path, values, seconds=300)
    assert first[0] == accepting.CANNOT_RUN and last == [accepting.FINISHED], (first, last)


@pytest.mark.parametrize(("name", "provider"), [("trt", "cpu"), ("trt-rtx", "cpu"), ("ort", "cuda")])
def test_another_process_opens_decoders_of_every_engine_of_a_gpu(name: str, provider: str) -> None:
    """As the footprint of `bench` does: the engine reaches the process as it is."""
    engine = load_engine(name, provider)
    same = pickle.loads(pickle.dumps(engine.open_runner)).__self__
    assert type(same) is type(engine) and vars(same) == vars(engine)


def test_an_engine_that_hangs_is_ended(values: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit passes as soon as the engine is open."""
    answer = Child.answer
    opened: list[Any] = []

    def impatient(self: Child, seconds: float | None = None) -> Any:
        event = answer(self, 0.2 if opened else 300)
        opened.extend([event] if event[:2] == ["doing", "nbl"] else [])
        return event

    monkeypatch.setattr(Child, "answer", impatient)
    monkeypatch.setattr("nbl_export.child.GRACE_SECONDS", 0.2)
    hung = results(apart(values, "hang", 1800))[-1]
    assert hung["detail"] == "no answer within 1800 s: it hung while running one sequence of 56 tokens"
    assert not hung["passed"]
