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
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.rewrite import rewrite
from nbl_export.records.decoder import DecoderSpec, TensorInfo
from nbl_export.records.plan import Plan
from nbl_export.records.results import CheckResult
from nbl_export.targets.checks import ExpectedGraph, judge_maps
from nbl_export.targets.onnx_files import check_files, check_untouched, read_maps
from nbl_export.verify import exporter, structure
from nbl_export.verify import verifier as verifying
from nbl_export.verify.ladder import (
    DECODE_STEPS,
    LONG_CHUNK,
    TOLERANCES,
    Probe,
    Reference,
    check_greedy,
    check_logits,
    check_long,
    shown_positions,
)
from nbl_export.verify.verifier import Verifier

from ..tiny import HEAD_DIM, HIDDEN, LAYERS, VOCAB

SPEC = DecoderSpec("llama", LAYERS, HIDDEN, 4, 2, HEAD_DIM, VOCAB, 512)


class FakeDecoder:
    """Answers with given logits [row][position], and remembers nothing else."""

    contract: Any = None

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


def probe(rows: list[list[int]]) -> Probe:
    return Probe(tuple(map(tuple, rows)), (), 0)


def judge(change: Callable[[list[np.ndarray]], object], limit: float = TOLERANCES["fp32"].limit) -> list[bool]:
    expected, rows = table()
    shown = [e.copy() for e in expected]
    change(shown)
    results = check_logits("nbl", "nbl", FakeDecoder(shown), probe(rows), Reference(tuple(expected), None), limit)
    return [r.passed for r in results]


def bump(row: int, position: int, by: float) -> Callable[[list[np.ndarray]], object]:
    def change(logits: list[np.ndarray]) -> None:
        logits[row][position, 3] += by

    return change


def test_one_wrong_position_fails_its_part_only() -> None:
    assert judge(bump(1, 5, 0.01)) == [False, True, False, True]
    assert judge(bump(0, 20 + 7, 0.01)) == [True, False, True, False]


def test_difference_below_the_limit_passes() -> None:
    assert judge(bump(1, 5, 0.001)) == [True] * 4


def test_a_batch_that_is_wrong_fails_alone() -> None:
    class OneSequence(FakeDecoder):
        def step(self, ids_BT: np.ndarray, valid_BT: np.ndarray | None = None) -> np.ndarray:
            return super().step(ids_BT, valid_BT) + (self.batch > 1)

    expected, rows = table()
    truth = Reference(tuple(expected), None)
    results = check_logits("nbl", "nbl", OneSequence(expected), probe(rows), truth, TOLERANCES["fp32"].limit)
    assert [r.passed for r in results] == [True, True, False, False]


@pytest.mark.parametrize(
    ("arithmetic", "allowed"),
    [("fp32", 1e-4), ("fp16", 0.01), ("bf16", 0.06), ("int8", 0.1), ("int4", 0.1), ("narrow", 0.1)],
)
def test_each_arithmetic_has_its_limit(arithmetic: str, allowed: float) -> None:
    for share, passed in ((0.9, True), (1.1, False)):

        def change(logits: list[np.ndarray], share: float = share) -> None:
            logits[:] = [row * np.float32(1 + share * allowed) for row in logits]

        assert judge(change, TOLERANCES[arithmetic].limit) == [passed] * 4


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", "fp32"), ("float16", "fp16")])
def test_what_does_not_round_has_the_limit_of_its_caches(dtype: str, allowed: str) -> None:
    inputs = (TensorInfo("input_ids", "int64", ()), TensorInfo("past_key_values.0.key", dtype, ()))
    decoder = SimpleNamespace(contract=SimpleNamespace(inputs=inputs))
    assert structure.unrounded_limit(decoder) == TOLERANCES[allowed].limit


@pytest.mark.parametrize("row", [0, 1])
def test_nan_fails_and_is_recorded_as_none(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, rows = table()
    shown = [e.copy() for e in expected]
    shown[row][4, 4] = np.nan
    limit = TOLERANCES["fp32"].limit
    results = check_logits("nbl", "nbl", FakeDecoder(shown), probe(rows), Reference(tuple(expected), None), limit)
    assert [(r.passed, r.value is None) for r in results] == [(False, True), (True, False)] * 2
    monkeypatch.setattr(exporter, "row_logits", lambda _model, given, _positions: shown[given[0]])
    (result,) = exporter.check_logits(None, "fp32", probe(rows), Reference(tuple(expected), None))
    assert (result.passed, result.value) == (False, None)
    margins = [(0.1,), (0.1,)]
    margins[row] = (np.nan,)
    text = check_greedy("nbl", [[1], [2]], [(2,), (1,)], margins, TOLERANCES["fp16"])
    assert (text.passed, text.value) == (False, None)


def test_positions_that_neither_side_computes_are_left_out() -> None:
    expected, rows = table()
    expected[0][1:15] = np.nan
    shown = [e.copy() for e in expected]

    def passed() -> list[bool]:
        truth = Reference(tuple(expected), None)
        results = check_logits("nbl", "nbl", FakeDecoder(shown), probe(rows), truth, TOLERANCES["fp32"].limit)
        return [r.passed for r in results]

    assert passed() == [True] * 4
    shown[0][15] += 0.1
    assert passed() == [False, True] * 2
    shown[0][14:16] = expected[0][15]  # one position more than the reference has
    assert passed() == [False, True] * 2
    shown[0][14:16] = np.nan  # one position less
    assert passed() == [False, True] * 2


def test_a_batch_in_which_all_tokens_continue_is_compared_with_its_own_logits() -> None:
    expected, rows = table()
    others, both = table(1)
    both = [[2, *both[0][1:]], [3, *both[1][1:]]]
    given = dataclasses.replace(probe(rows), continuing=tuple(map(tuple, both)))
    truth = Reference(tuple(expected), None, continuing=tuple(others))
    for wrong in (False, True):
        shown = [*expected, others[0], others[1] + wrong]
        results = check_logits("nbl", "nbl", FakeDecoder(shown), given, truth, TOLERANCES["fp32"].limit)
        assert [r.passed for r in results] == [True] * 4 + [not wrong] * 2
        assert results[4].detail == "batch of 2, all tokens continue"


@pytest.mark.parametrize("length", [40, 100, 1040])
def test_every_eighth_position_the_last_64_and_the_decode_steps_are_compared(length: int) -> None:
    wanted = {*range(0, length - 16, 8), *range(max(0, length - 80), length)}
    assert shown_positions(length).tolist() == sorted(wanted)


def test_a_wrong_decode_step_behind_a_long_row_fails_its_decode_alone() -> None:
    expected = np.random.default_rng(0).standard_normal((600, 30)).astype(np.float32)
    row = [0, *[1] * 599]
    truth = Reference((), expected[shown_positions(600)])
    for position, passed in ((599, [True, False]), (584, [True, False]), (583, [False, True])):
        wrong = expected.copy()
        wrong[position] += 0.1
        results = check_long("nbl", "nbl", FakeDecoder([wrong]), row, truth, TOLERANCES["fp32"].limit)
        assert [r.passed for r in results] == passed and results[1].metric.endswith("decode")


def test_what_depends_on_the_borders_of_chunks_is_seen() -> None:
    """The reference of a long row has other borders than what is compared."""

    class Bordered(FakeDecoder):
        def step(self, ids_BT: np.ndarray, valid_BT: np.ndarray | None = None) -> np.ndarray:
            return super().step(ids_BT, valid_BT) + (ids_BT.shape[1] == LONG_CHUNK)

    decoder, row = Bordered([np.random.default_rng(0).standard_normal((1100, 30))]), (0, *[1] * 1099)
    truth = verifying._fp32_reference(decoder, Probe((), (), 0, row), stops=False)
    results = check_long("nbl", "nbl", decoder, row, truth, TOLERANCES["fp32"].limit)
    assert [r.passed for r in results] == [False, True]


def test_one_graph_is_open_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes its weights in memory."""
    expected, rows = table()
    alive: weakref.WeakSet[FakeDecoder] = weakref.WeakSet()
    seen: list[int] = []

    def opened(*_given: object, **_named: object) -> FakeDecoder:
        seen.append(len(alive))
        alive.add(made := FakeDecoder(expected))
        return made

    @contextlib.contextmanager
    def open_checked(_directory: Path) -> Iterator[mock.Mock]:
        seen.append(len(alive))
        yield mock.Mock(greedy=lambda _prompt, tokens: list(range(tokens)))

    engine = SimpleNamespace(
        open_graph=opened, open_reference=opened, open_checked=open_checked, read_maps=mock.Mock(),
        pruned_file=lambda _: "pruned", check=lambda *_: [],
    )  # fmt: skip
    verification: Any = SimpleNamespace(
        engine=engine, spec=SPEC, plan=Plan.of(LAYERS, {}), rounds=True, tolerance=TOLERANCES["int4"],
        wanted=lambda *_: ExpectedGraph("nbl", SPEC, "int4", "last", (), {}), task=lambda _: mock.MagicMock(),
    )  # fmt: skip
    for name, found in {"expected_last": [], "check_last": [], "_measured_cache": mock.Mock(passed=True)}.items():
        monkeypatch.setattr(structure, name, lambda *_, found=found: found)
    for module in (structure, verifying):
        monkeypatch.setattr(module, "unrounded_limit", lambda _: 1e-4)
    monkeypatch.setattr(verifying, "greedy", lambda *_: ((0, 1, 2, 3), (1.0,) * 4))
    made = Verifier(verification, Probe(tuple(map(tuple, rows)), ((1, 2),), 4), {})
    made.run({"original": Path("a"), "nbl": Path("b")}, {"original": Path("a"), "nbl": Path("b")})
    assert all(r.passed for r in made.results) and list(made.references) == ["original", "nbl"]
    assert seen == [0] * len(seen) and len(seen) == 11  # references, both graphs and text of both; what ships of nbl


@pytest.mark.parametrize(("margin", "passed"), [(9.0, True), (np.nan, False)])
def test_text_of_the_original_warns_and_fails_only_if_its_margin_is_not_finite(margin: float, passed: bool) -> None:
    runner = mock.MagicMock()
    runner.__enter__.return_value.greedy.return_value = [1]
    engine = SimpleNamespace(open_checked=lambda _run: runner)
    verification: Any = SimpleNamespace(engine=engine, tolerance=TOLERANCES["fp32"])
    made = Verifier(verification, Probe(((1,),), ((1,),), 1), {})
    made.references["original"] = Reference((), None, ((2,),), ((margin,),))
    made._text("original", Path("a"))
    assert [(r.passed, len(made.warnings)) for r in made.results] == [(passed, int(passed))]


def test_greedy_difference_counts_only_where_the_reference_was_decided() -> None:
    theirs, margins, exact = (
        [(1, 2, 3, 4)],
        [(5.0, 0.001, 5.0, 5.0)],
        dataclasses.replace(TOLERANCES["fp32"], greedy_equal=0.25),
    )
    assert check_greedy("nbl", [[1, 2, 3, 4]], theirs, margins, exact).passed
    assert check_greedy("nbl", [[1, 9, 9, 9]], theirs, margins, exact).passed
    assert not check_greedy("nbl", [[1, 2, 9, 4]], theirs, margins, exact).passed


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_largest_margin_of_several_prompts_decides(order: tuple[int, int]) -> None:
    theirs: list[Any] = [(1, 2), (3, 4)]
    margins: list[Any] = [(2.0, 5.0), (0.001, 5.0)]
    said: list[Any] = [[9, 2], [9, 4]]
    said, theirs, margins = ([values[k] for k in order] for values in (said, theirs, margins))
    result = check_greedy("nbl", said, theirs, margins, TOLERANCES["fp16"])
    assert (result.passed, result.value) == (False, 2.0)


@pytest.mark.parametrize(("least", "passed"), [(0.5, True), (0.51, False)])
def test_equal_tokens_of_all_prompts_are_counted_together(least: float, passed: bool) -> None:
    tolerance = dataclasses.replace(TOLERANCES["fp32"], greedy_equal=least)
    assert check_greedy("nbl", [[1, 2], [9, 5]], [(1, 2), (4, 5)], [(0.0, 0.0)] * 2, tolerance).passed is passed


def test_file_rung_on_real_graphs(
    exported: Callable[..., Path], random_maps: Callable[..., dict[int, Linear]], tmp_path: Path
) -> None:
    rewrite(exported("llama"), tmp_path / "nbl", random_maps(0))
    session = OnnxDecoder(tmp_path / "nbl", HEAD_DIM).contract

    def found(*layers: int) -> list[CheckResult]:
        return check_files(tmp_path / "nbl", session, ExpectedGraph("nbl", SPEC, "fp32", "all", layers, {}))

    right = found(1, 2)
    assert [r.metric for r in right if r.passed] == [
        "onnx checker and shape inference",
        "contract",
        "cache bytes per token",
    ]
    wrong = found(0, 2)
    assert [r.metric for r in wrong if not r.passed] == ["contract"]
    fewer = found(1)
    assert [r.metric for r in fewer if not r.passed] == ["contract", "cache bytes per token"]


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
    held = read_maps(tmp_path / "nbl")
    assert judge_maps("nbl", held, maps).passed
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
        result = judge_maps("nbl", held, wrong)
        assert not result.passed
        assert result.detail == detail
    assert not judge_maps("original", held, {}).passed


def test_a_weight_changed_in_passing_is_seen(
    exported: Callable[..., Path], random_maps: Callable[..., dict[int, Linear]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import onnx

    monkeypatch.setattr("nbl_export.targets.onnx_files._PIECE", 100)  # the change is in the last piece
    original = exported("llama")
    rewrite(original, tmp_path / "nbl", random_maps(1))
    model = onnx.load(str(tmp_path / "nbl" / "model.onnx"))
    (tensor,) = [t for t in model.graph.initializer if t.name == "model.layers.2.mlp.up_proj.MatMul.weight"]
    changed = onnx.numpy_helper.to_array(tensor).copy()
    changed[-1, -1] += 1e-6
    tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
    (tmp_path / "changed").mkdir()
    onnx.save(model, str(tmp_path / "changed" / "model.onnx"))
    (result,) = check_untouched(tmp_path / "changed", original)
    assert (result.passed, result.detail) == (False, "model.layers.2.mlp.up_proj.MatMul.weight differs")
