"""The checks of `accept` on a stand-in of TensorRT that executes the run's own graph: each planted fault is named.

Expected values are those of torch. `tests.fake_engine.StandIn` says what the faults are.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import CorruptError, NblError
from nbl_export.methods.applied import linearize
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.predicted_kv.reference import onnx_reference
from nbl_export.records.results import CheckResult
from nbl_export.run import accept as accepting
from nbl_export.run.deployed import Located
from nbl_export.targets import load_engine
from nbl_export.targets.tensorrt.static.host import CheckedRunner
from nbl_export.verify import ladder, on_target
from nbl_export.verify.exporter import row_logits
from nbl_export.verify.ladder import Probe, Reference, shown_positions
from nbl_export.verify.on_target import POSITIONS, expect, load, save

from ..exits import predicted_maps
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
    path = tmp_path_factory.mktemp("values") / "acceptance-values.json"
    save(expect("fp16", probe, found), path)
    return path


@pytest.mark.parametrize("recent_tokens", [8, 20])
def test_an_exit_layer_is_compared_in_the_steps_of_its_reference(recent_tokens: int) -> None:
    """The cached steps of `last_token` continue whole, which one chunk of them does not if W is small."""
    directory = graph_of("llama", (), "fp32", exit_layer=(1, recent_tokens))
    first, second = (
        row[: n + ladder.DECODE_STEPS] for row, n in zip(rows(), (recent_tokens + 25, recent_tokens + 2), strict=True)
    )
    probe = Probe((tuple(first), tuple(second)), (tuple(rows()[0][: recent_tokens + 24]),), 8, ())
    maps = predicted_maps(1, recent_tokens, 2 * HEAD, HIDDEN, LAYERS)
    decoder = onnx_reference(directory.parent / "original", HEAD, maps)
    texts, margins = zip(*(ladder.greedy(decoder, prompt, probe.new_tokens) for prompt in probe.prompts), strict=True)
    logits = tuple(ladder.run_rows(decoder, [row])[0] for row in probe.rows)
    reference = Reference(logits, None, texts, margins)
    expected = expect("fp32", probe, {"original": reference, "nbl": reference}, recent_tokens)
    with CheckedRunner(open_decoder(directory / "decoder.onnx"), directory) as runner:
        found = list(on_target.checks(runner, "nbl", expected))
        steps = dataclasses.replace(expected, continuing=None)
        other = next(r for r in on_target.checks(runner, "nbl", steps) if r.check == "last_token")
    assert [r for r in found if not r.passed and r.check != "clock"] == []
    assert not other.passed


def checked(values: Path, fault: str = "", yardstick: float | None = None) -> list[Any]:
    """What is sent of the NBL graph, in this process."""
    sent: list[Any] = []
    accepting.examine(sent.append, StandIn(fault).open, "nbl", graph_of("llama", (1,)), values, yardstick)
    assert sent.pop() == ""
    return sent


# -- expected values ---------------------------------------------------------------------------------------------


def test_values_come_back_as_they_were(values: Path, tmp_path: Path) -> None:
    found = load(values)
    assert (found.precision, found.long, found.continuing) == ("fp16", True, None)
    assert [len(row) for row in found.rows] == [56, 41, SLOTS]
    for sample in found.samples.values():
        assert np.shape(sample.columns) == np.shape(sample.logits) == (3, POSITIONS, 144)
    assert not np.argmax(found.samples["nbl"].logits, axis=-1).any()  # the likeliest token comes first
    save(found, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == values.read_bytes()
    assert values.stat().st_size < 500_000


def change(values: dict[str, Any], place: str, value: Any) -> None:
    *path, last = place.split(".")
    for name in path:
        values = values[name]
    values[last] = value


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ("precision", "fp9", "unknown precision 'fp9'"),
        ("rows", [], "a row is missing or too short"),
        ("rows", [[1, 2]], "a row is missing or too short"),
        ("rows", [[1.5] * 20], "'rows' is of the wrong kind"),
        ("prompts", [], "prompts and text of original differ"),
        ("samples", {}, "a decoder is missing"),
        ("samples.nbl.columns", [], "columns and logits differ"),
        ("samples.nbl.logits", [[[1.0, 2.0], [1.0]]], "inhomogeneous shape"),
        ("samples.nbl.margins", [[math.nan]], "'margins' is of the wrong kind"),
        ("samples.nbl.greedy", [], "prompts and text of nbl differ"),
        ("schema", 1, "unexpected keyword argument 'schema'"),
    ],
)
def test_values_that_do_not_fit_are_refused(place: str, value: Any, reason: str, values: Path, tmp_path: Path) -> None:
    found = json.loads(values.read_text())
    change(found, place, value)
    (tmp_path / "a.json").write_text(json.dumps(found))
    with pytest.raises(CorruptError, match=rf"a\.json cannot be read \(.*{reason}.*verify again where"):
        load(tmp_path / "a.json")


def test_a_cut_file_and_a_missing_file_are_refused(values: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_bytes(values.read_bytes()[:5000])
    (tmp_path / "list.json").write_text("[]")
    for name in ("cut", "list"):
        with pytest.raises(CorruptError, match=rf"{name}.json cannot be read"):
            load(tmp_path / f"{name}.json")
    with pytest.raises(NblError, match="is missing, which verification leaves for engines of a GPU: copy it"):
        load(tmp_path / "none.json")


# -- checks --------------------------------------------------------------------------------------------------------


def test_every_check_passes(values: Path) -> None:
    found = checked(values)
    assert [result["check"] for result in found] == [*["nbl"] * 6, "last_token", "text", "clock"]
    assert [result for result in found if not result["passed"]] == []
    logits = [result for result in found if "logit difference" in result["metric"]]
    assert all(0 < result["value"] < result["tolerance"] == 0.02 for result in logits)  # fp16 rounds
    assert "96 tokens" in logits[1]["detail"] and "decode" in logits[1]["metric"]


FAULTS = {
    "other graph": ("nbl", "relative rms logit difference, prefill", "one sequence of 96 tokens"),
    "late decode": ("nbl", "relative rms logit difference, decode", "one sequence of 96 tokens"),
    "nan": ("nbl", "relative rms logit difference, prefill", "one sequence of 96 tokens"),
    "chunks": ("last_token", "chunk behind a cache", "56 tokens in chunks that begin at 0, 20, 40"),
    "leak": ("nbl", "relative rms logit difference, prefill", "one sequence of 41 tokens"),
    "early clock": ("clock", "reading its token takes", "reading its token afterwards"),
    "memory": ("nbl", "come to their end", "MemoryError: "),
    "close": ("nbl", "come to their end", "cudaFree: cudaErrorInvalidValue"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_by_its_check(fault: str, values: Path) -> None:
    check, metric, detail = FAULTS[fault]
    failed = [result for result in checked(values, fault) if not result["passed"]]
    assert failed and failed[0]["check"] == check, failed
    assert metric in failed[0]["metric"] and detail in failed[0]["detail"], failed[0]
    if fault not in ("other graph", "nan", "late decode", "leak"):
        assert len(failed) == 1, failed


def test_the_nbl_engine_may_be_twice_as_far_as_the_original(values: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault within the limit of the precision shows beside the original's own distance."""
    long_range = max(r["value"] for r in checked(values) if r["check"] == "nbl")
    for yardstick, passed in ((0.51 * long_range, True), (0.49 * long_range, False)):
        found = [r for r in checked(values, yardstick=yardstick) if r["check"] == "nbl"]
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
    ended = accepting._broken("original", "a crash")
    assert accepting._yardstick([*found, ended]) == 0.3
    assert accepting._yardstick([*found[2:], ended]) is None


def test_other_text_fails_where_torch_is_sure(values: Path, tmp_path: Path) -> None:
    assert all(result["passed"] for result in checked(values, "other text"))
    found = json.loads(values.read_text())
    change(found, "samples.nbl.margins", [[1.0] * 12])
    (tmp_path / "sure.json").write_text(json.dumps(found))
    assert all(result["passed"] for result in checked(tmp_path / "sure.json"))
    (failed,) = [r for r in checked(tmp_path / "sure.json", "other text") if not r["passed"]]
    assert (failed["check"], failed["value"], failed["tolerance"]) == ("text", 1.0, 0.5)
    assert "tokens the same up to the first difference" in failed["detail"]


def test_an_engine_that_does_not_fit_cannot_run(values: Path) -> None:
    sent: list[Any] = []
    accepting.examine(sent.append, StandIn("other version").open, "nbl", graph_of("llama", (1,)), values)
    (said,) = sent
    assert "was built by tensorrt 1.2.3, and 1.2.4 is installed, which does not take it" in said


# -- the process of its own ----------------------------------------------------------------------------------------


def test_a_crash_is_a_failed_check(values: Path) -> None:
    *passed, crashed = accepting.examined(StandIn("crash").open, "nbl", graph_of("llama", (1,)), values)
    assert len(passed) == 2 and all(result["passed"] for result in passed)
    assert (crashed["check"], crashed["passed"]) == ("nbl", False)
    assert "ended with status -6 (SIGABRT, a crash in a library" in crashed["detail"]
    assert crashed["detail"].endswith("after 2 results")


def test_another_process_finds_the_engine_of_a_run(values: Path, tmp_path: Path) -> None:
    """As `accept` names it, without a stand-in: nothing runs in an empty directory, with or without a GPU."""
    with pytest.raises(NblError, match=r"engine trt-rtx is not available|holds no engine"):
        accepting.examined(Located(tmp_path, "trt-rtx").open, "nbl", tmp_path, values)


@pytest.mark.parametrize(("name", "provider"), [("trt", "cpu"), ("trt-rtx", "cpu"), ("ort", "cuda")])
def test_another_process_opens_decoders_of_every_engine_of_a_gpu(name: str, provider: str) -> None:
    """As the footprint of `bench` does: the engine reaches the process as it is."""
    engine = load_engine(name, provider)
    same = pickle.loads(pickle.dumps(engine.open_runner)).__self__
    assert type(same) is type(engine) and vars(same) == vars(engine)
