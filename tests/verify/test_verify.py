"""The ladder judges right: what passes, what fails, and what the price says."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.mixers.linear import Linear
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.results import CheckResult
from nbl_export.rewrite import rewrite
from nbl_export.targets.checks import held_names
from nbl_export.targets.onnx_files import check_file, check_maps, check_untouched
from nbl_export.verify.ladder import (
    DECODE_STEPS,
    NOISE_FACTOR,
    TOLERANCES,
    WITHOUT_TWIN,
    Probe,
    Reference,
    Tolerance,
    check_greedy,
    check_logits,
    run_rows,
)
from nbl_export.verify.verifier import Verifier

from ..tiny import HEAD_DIM, HIDDEN, LAYERS, VOCAB

SPEC = DecoderSpec("llama", LAYERS, HIDDEN, 4, 2, HEAD_DIM, VOCAB, 512)


class FakeDecoder:
    """Answers with given logits [row][position], and remembers nothing else."""

    def __init__(self, logits: list[np.ndarray]) -> None:
        self.table = logits

    def begin(self, batch: int) -> None:
        self.batch, self.place, self.row = batch, [0] * batch, dict[int, int]()

    def step(self, ids_BT: np.ndarray, valid_BT: np.ndarray | None = None) -> np.ndarray:
        valid = np.ones_like(ids_BT) if valid_BT is None else valid_BT
        out = np.zeros((*ids_BT.shape, self.table[0].shape[1]), np.float32)
        for b in range(self.batch):
            row = self.table[self.row.setdefault(b, int(ids_BT[b, 0]))]
            for t in range(int(valid[b].sum())):
                out[b, t] = row[self.place[b] + t]
            self.place[b] += int(valid[b].sum())
        return out


def table(seed: int = 0) -> tuple[list[np.ndarray], list[list[int]]]:
    """Logits of two rows of 20 and 12 prefill tokens, and the rows, whose first token names them."""
    rng = np.random.default_rng(seed)
    lengths = (20 + DECODE_STEPS, 12 + DECODE_STEPS)
    rows = [[k, *rng.integers(2, 30, n - 1).tolist()] for k, n in enumerate(lengths)]
    return [rng.standard_normal((n, 30)).astype(np.float32) for n in lengths], rows


def reference(expected: list[np.ndarray], noise: list[np.ndarray]) -> Reference:
    return Reference(tuple(expected), tuple(noise), (), ())


def judge(change: Callable[[list[np.ndarray]], object], tolerance: Tolerance = TOLERANCES["fp32"], noise: float = 0.0,
          yardstick: float | None = None) -> list[bool]:  # fmt: skip
    expected, rows = table()
    shown = [e.copy() for e in expected]
    change(shown)
    spread = [np.full(len(e), noise, np.float32) for e in expected]
    results = check_logits("nbl", "nbl", FakeDecoder(shown), rows, reference(expected, spread), tolerance, yardstick)
    return [r.passed for r in results]


def bump(row: int, position: int, by: float) -> Callable[[list[np.ndarray]], object]:
    def change(logits: list[np.ndarray]) -> None:
        logits[row][position, 3] += by

    return change


def test_equal_logits_pass() -> None:
    assert judge(lambda _l: None) == [True] * 4


def test_one_wrong_position_fails_its_part_only() -> None:
    assert judge(bump(1, 5, 0.002)) == [False, True, False, True]
    assert judge(bump(0, 20 + 7, 0.002)) == [True, False, True, False]


def test_difference_below_the_limit_passes() -> None:
    assert judge(bump(1, 5, 0.0005)) == [True] * 4


def test_nan_fails_and_is_recorded_as_none() -> None:
    expected, rows = table()
    shown = [e.copy() for e in expected]
    shown[0][4, 4] = np.nan
    quiet = [np.zeros(len(e)) for e in expected]
    results = check_logits("nbl", "nbl", FakeDecoder(shown), rows, reference(expected, quiet), TOLERANCES["fp32"])
    assert [(r.passed, r.value is None) for r in results] == [(False, True), (True, False)] * 2


def test_noise_of_the_position_widens_its_own_limit_only() -> None:
    noisy = 0.001
    assert judge(bump(1, 5, NOISE_FACTOR * noisy * 0.9), noise=noisy) == [True] * 4
    assert judge(bump(1, 5, NOISE_FACTOR * noisy * 1.1), noise=noisy) == [False, True, False, True]


def climb_with_noise(noise: float, by: float, metric: str = "max_abs") -> tuple[list[bool], int]:
    """What the logits check of a graph says that is off by `by` at one position, and how often noise was measured."""
    expected, rows = table()
    shown = [e.copy() for e in expected]
    bump(1, 5, by)(shown)
    truth = reference(expected, [np.zeros(len(e), np.float32) for e in expected])
    spread = tuple(np.full(len(e), noise, np.float32) for e in expected)
    measure = mock.Mock(side_effect=lambda _subject, of: dataclasses.replace(of, noise=spread, noisy=True))
    results: list[CheckResult] = []
    setting: Any = SimpleNamespace(static=False, precision="fp32")
    verifier = Verifier(setting, Probe(tuple(map(tuple, rows)), (), 0), {}, results, mock.Mock())
    verifier.truth["original"], verifier._noise_of["own"] = truth, measure
    tolerance = dataclasses.replace(TOLERANCES["fp32"], metric=metric)
    for _ in range(2):  # the second graph that needs the noise finds it measured
        verifier._logits("original", "original", FakeDecoder(shown), tolerance)
    assert verifier.truth["original"].noisy == measure.called
    assert [r.passed for r in results[:4]] == [r.passed for r in results[4:]]
    return [r.passed for r in results[:4]], measure.call_count


def test_one_graph_is_open_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes its weights in memory. The decoders of the price are opened when all runtimes are closed."""
    expected, rows = table()
    alive: weakref.WeakSet[FakeDecoder] = weakref.WeakSet()
    seen: list[int] = []

    def open_graph(_directory: Path, _spec: object) -> FakeDecoder:
        seen.append(len(alive))
        alive.add(made := FakeDecoder(expected))
        return made

    @contextlib.contextmanager
    def open_checked(_directory: Path) -> Iterator[mock.Mock]:
        seen.append(len(alive))
        yield mock.Mock(greedy=lambda _prompt, tokens: list(range(tokens)))

    engine = SimpleNamespace(open_graph=open_graph, open_checked=open_checked, check_untouched=lambda *_: [])
    setting: Any = SimpleNamespace(
        static=False, precision="fp32", narrow=False, engine=engine, spec=SPEC, wanted=mock.Mock()
    )
    monkeypatch.setattr("nbl_export.verify.verifier.check_directory", lambda *_: [])
    results: list[CheckResult] = []
    verifier = Verifier(setting, Probe(tuple(map(tuple, rows)), ((1, 2),), 4), {}, results, mock.Mock())
    quiet = [np.zeros(len(e), np.float32) for e in expected]
    truth = dataclasses.replace(reference(expected, quiet), greedy=((0, 1, 2, 3),), margins=((1.0,) * 4,))
    verifier.truth = {"original": truth, "nbl": truth}
    decoders = verifier.run({"original": Path("a"), "nbl": Path("b")}, {})
    assert all(r.passed for r in results) and list(decoders) == ["original", "nbl"]
    assert seen == [0, 0, 0, 0, 0, 1]  # graph, runtime, graph, runtime, and both graphs for the price


def test_noise_is_measured_only_if_a_position_differs_by_more_than_the_limit() -> None:
    assert climb_with_noise(0.001, 0.0005) == ([True] * 4, 0)
    assert climb_with_noise(0.001, 0.002) == ([True] * 4, 1)
    assert climb_with_noise(0.0001, 0.002) == ([False, True, False, True], 1)
    assert climb_with_noise(0.001, 0.2, "relative_rms") == ([False, True, False, True], 0)


def test_known_noise_widens_nothing_that_passes_without_it() -> None:
    """A reference that was kept with its noise gives the same results as one whose noise is not known."""
    expected, rows = table()
    quiet = reference(expected, [np.zeros(len(e), np.float32) for e in expected])
    noisy = dataclasses.replace(quiet, noise=tuple(np.ones(len(e), np.float32) for e in expected), noisy=True)
    found = []
    for truth in (quiet, noisy):
        results: list[CheckResult] = []
        setting: Any = SimpleNamespace(static=False, precision="fp32")
        verifier = Verifier(setting, Probe(tuple(map(tuple, rows)), (), 0), {}, results, mock.Mock())
        verifier.truth["original"] = truth
        verifier._logits("original", "original", FakeDecoder(expected), TOLERANCES["fp32"])
        found.append(results)
    assert found[0] == found[1]


def test_quantised_rows_are_held_to_the_original_graphs_own_error() -> None:
    def scaled(logits: list[np.ndarray]) -> None:
        for row in logits:
            row *= 1.2  # a relative rms error of 0.2

    coarse = WITHOUT_TWIN["int4"]
    assert judge(scaled, coarse, yardstick=0.19) == [True] * 4
    assert judge(scaled, coarse, yardstick=0.10) == [False] * 4
    assert judge(scaled, TOLERANCES["int8"]) == [False] * 4


def test_every_precision_has_one_row() -> None:
    assert set(TOLERANCES) >= {"fp32", "fp16", "int8", "int4"}


def test_greedy_difference_counts_only_where_torch_was_decided() -> None:
    theirs, margins, exact = (
        [(1, 2, 3, 4)],
        [(5.0, 0.001, 5.0, 5.0)],
        dataclasses.replace(TOLERANCES["fp32"], greedy_equal=0.25),
    )
    assert check_greedy("nbl", [[1, 2, 3, 4]], theirs, margins, exact).passed
    assert check_greedy("nbl", [[1, 9, 9, 9]], theirs, margins, exact).passed
    assert not check_greedy("nbl", [[1, 2, 9, 4]], theirs, margins, exact).passed


def test_file_rung_on_real_graphs(
    exported: Callable[..., Path], random_maps: Callable[..., dict[int, Linear]], tmp_path: Path
) -> None:
    rewrite(exported("llama"), tmp_path / "nbl", random_maps(0))
    session = OnnxDecoder(tmp_path / "nbl", HEAD_DIM).contract
    right = check_file("nbl", tmp_path / "nbl", SPEC, held_names((1, 2)), session, 4)
    assert [r.metric for r in right if r.passed] == [
        "onnx checker and shape inference",
        "contract",
        "cache bytes per token",
    ]
    wrong = check_file("nbl", tmp_path / "nbl", SPEC, held_names((0, 2)), session, 4)
    assert [r.metric for r in wrong if not r.passed] == ["contract"]
    fewer = check_file("nbl", tmp_path / "nbl", SPEC, held_names((1,)), session, 4)
    assert [r.metric for r in fewer if not r.passed] == ["contract", "cache bytes per token"]


def test_batch_and_single_rows_agree_on_a_real_graph(exported: Callable[..., Path]) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(2, VOCAB, n + DECODE_STEPS).tolist() for n in (21, 9)]
    decoder = OnnxDecoder(exported("llama"), HEAD_DIM)
    together = run_rows(decoder, rows)
    for got, row in zip(together, rows, strict=True):
        np.testing.assert_allclose(got, run_rows(decoder, [row])[0], atol=1e-4)


@pytest.mark.parametrize(
    ("source", "precision"), [("genai", p) for p in ("fp32", "int8", "int4")] + [("mobius", "fp16")]
)
def test_maps_are_read_back_out_of_the_graph(
    source: str, precision: str, exported: Callable[..., Path], random_maps: Callable[..., dict[int, Linear]],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Faults that quantised logits would not show: two maps exchanged, a lost bias, a transposed map."""
    original, maps = exported("llama", source, precision), random_maps(0, 1)
    rewrite(original, tmp_path / "nbl", maps)
    assert [r.passed for r in check_maps("nbl", tmp_path / "nbl", maps)] == [True]
    assert [r.passed for r in check_untouched(tmp_path / "nbl", original)] == [True]
    exchanged = {0: Linear(maps[1].weight, maps[0].bias), 1: maps[1]}
    unbiased = {0: maps[0], 1: Linear(maps[1].weight, np.zeros_like(maps[1].bias))}
    transposed = {0: maps[0], 1: Linear(np.ascontiguousarray(maps[1].weight.T), maps[1].bias)}
    for wrong, detail in (
        (exchanged, "layer 0's weight is not the fitted one"),
        (unbiased, "layer 1 has a bias"),
        (transposed, "layer 1's weight is not the fitted one"),
        (random_maps(2), "layer 2 has no map"),
    ):
        (result,) = check_maps("nbl", tmp_path / "nbl", wrong)
        assert not result.passed
        assert result.detail == detail
    (result,) = check_maps("original", tmp_path / "nbl", {})
    assert not result.passed


def test_a_weight_changed_in_passing_is_seen(
    exported: Callable[..., Path], random_maps: Callable[..., dict[int, Linear]], tmp_path: Path
) -> None:
    import onnx

    original = exported("llama")
    rewrite(original, tmp_path / "nbl", random_maps(1))
    model = onnx.load(str(tmp_path / "nbl" / "model.onnx"))
    (tensor,) = [t for t in model.graph.initializer if t.name == "model.layers.2.mlp.up_proj.MatMul.weight"]
    changed = onnx.numpy_helper.to_array(tensor).copy()
    changed[0, 0] += 1e-6
    tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
    (tmp_path / "changed").mkdir()
    onnx.save(model, str(tmp_path / "changed" / "model.onnx"))
    (result,) = check_untouched(tmp_path / "changed", original)
    assert (result.passed, result.detail) == (False, "model.layers.2.mlp.up_proj.MatMul.weight differs")
