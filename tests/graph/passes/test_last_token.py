"""What ships gives the logits of the last token; the graph with all of them lies beside it, and holds it to account."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.errors import NblError, RefusalError
from nbl_export.evaluation.scorer import graph_scorer
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.names import ALL_LOGITS_FILE, GRAPH_FILE, all_logits_file
from nbl_export.graph.passes.tail import difference, keep_last_token
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.rewrite import rewrite
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.results import CheckResult
from nbl_export.targets.checks import ExpectedGraph
from nbl_export.targets.onnx.engine import ORT
from nbl_export.targets.onnx_files import check, check_files
from nbl_export.verify.ladder import TOLERANCES
from nbl_export.verify.last_token import BATCH_LENGTHS, check_last, expected_last
from tests.command import assert_refused, configured, nbl
from tests.tiny import HEAD_DIM, HIDDEN, LAYERS, VOCAB

pytestmark = pytest.mark.job

Exported = Callable[..., Path]
Maps = Callable[..., dict[int, Linear]]
SPEC = DecoderSpec("llama", LAYERS, HIDDEN, 4, 2, HEAD_DIM, VOCAB, 512)
ROW = np.random.default_rng(5).integers(2, VOCAB, 40).tolist()
QUANTISED = [("genai", "int8"), ("genai", "int4"), ("mobius", "fp16")]


def ship(source: Path, tmp_path: Path, maps: dict[int, Linear]) -> dict[str, Path]:
    """The original with a pruned tail, and its NBL version."""
    places = {"original": tmp_path / "original", "nbl": tmp_path / "nbl"}
    shutil.copytree(source, places["original"])
    keep_last_token(places["original"])
    rewrite(places["original"], places["nbl"], maps)
    return places


def held(directory: Path, precision: str = "fp32") -> list[CheckResult]:
    every, last = (
        OnnxDecoder(directory, HEAD_DIM, file=name, fp32_activations=True) for name in (ALL_LOGITS_FILE, GRAPH_FILE)
    )
    expected = expected_last(every, ROW, TOLERANCES["fp16" if precision == "fp16" else "fp32"].limit)
    return check_last("nbl", expected, last, ROW)


@pytest.mark.parametrize("replaced", [(), (2,), (1, 2), (0, 1)], ids=str)
@pytest.mark.parametrize("source", ["genai", "mobius"])
def test_files_and_logits(
    source: str, replaced: tuple[int, ...], exported: Exported, random_maps: Maps, tmp_path: Path
) -> None:
    """Every check on what ships passes, for the original and for the plan; the empty plan copies byte for byte."""
    export, maps = exported("llama", source), random_maps(*replaced)
    places = ship(export, tmp_path, maps)
    assert (places["original"] / ALL_LOGITS_FILE).read_bytes() == (export / "model.onnx").read_bytes()
    assert (places["original"] / "model.onnx.data").read_bytes() == (export / "model.onnx.data").read_bytes()
    for subject, kept in (("original", range(LAYERS)), ("nbl", [i for i in range(LAYERS) if i not in replaced])):
        directory = places[subject]
        contract = OnnxDecoder(directory, HEAD_DIM).contract
        assert contract.logits == "last"
        assert OnnxDecoder(directory, HEAD_DIM, file=all_logits_file(directory)).contract.logits == "all"
        wanted = ExpectedGraph(subject, SPEC, "fp32", "last", tuple(kept), {} if subject == "original" else maps)
        results = check(directory, contract, wanted, places["original"]) + held(directory)
        assert all(r.passed for r in results), [r for r in results if not r.passed]
        assert difference(directory) == ""
        every = dataclasses.replace(wanted, logits="all")
        assert not all(r.passed for r in check_files(directory, contract, every))
    if not replaced:
        for name in ("model.onnx", ALL_LOGITS_FILE, "model.onnx.data"):
            assert (places["nbl"] / name).read_bytes() == (places["original"] / name).read_bytes()


@pytest.mark.parametrize(("source", "precision"), QUANTISED)
def test_other_precisions(source: str, precision: str, exported: Exported, random_maps: Maps, tmp_path: Path) -> None:
    for directory in ship(exported("llama", source, precision), tmp_path, random_maps(1, 2)).values():
        assert difference(directory) == ""
        results = held(directory, precision)
        assert [r.passed for r in results] == [True] * 3, results


def test_a_constant_that_differs_is_named(exported: Exported, random_maps: Maps, tmp_path: Path) -> None:
    original = ship(exported("llama"), tmp_path, random_maps(2))["original"]
    model = ir.load(original / "model.onnx")
    model.graph.initializers["nbl.tail.last"].const_value = ir.tensor([1], name="nbl.tail.last")
    ir.save(model, original / "model.onnx")
    assert difference(original) == "initializer nbl.tail.last differs"


# -- planted faults ----------------------------------------------------------------------------------------


def plant(directory: Path, change: Callable[[dict[str, ir.Node]], object]) -> None:
    model = ir.load(directory / "model.onnx")
    change({str(node.name): node for node in model.graph})
    ir.save(model, directory / "model.onnx")


def graph_of(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def last_column(nodes: dict[str, ir.Node]) -> None:
    """Gather -1 instead of the last valid token: as if all of the chunk were valid."""
    valid = nodes["/nbl/tail/valid"]
    mask, positions = valid.inputs
    all_valid = ir.node("Sub", [mask, mask], name="nothing")
    columns = ir.node("Add", [all_valid.outputs[0], positions], name="columns")
    graph_of(valid).insert_before(valid, [all_valid, columns])
    nodes["/nbl/tail/found"].replace_input_with(0, columns.outputs[0])


def first_token(nodes: dict[str, ir.Node]) -> None:
    found = nodes["/nbl/tail/found"]
    lowest = ir.node("ReduceMin", found.inputs, attributes={"keepdims": 1}, name="lowest")
    graph_of(found).insert_before(found, [lowest])
    nodes["/nbl/tail/index"].replace_input_with(0, lowest.outputs[0])


def one_branch(nodes: dict[str, ir.Node]) -> None:
    gather = nodes["/nbl/tail/residual"]
    assert gather.inputs[0] is not None
    gather.outputs[0].replace_all_uses_with(gather.inputs[0])


PREFILL, CHUNK, BATCH = (
    "prefill",
    "chunk of 7 after a cache of 13, then decode",
    "batch of lengths 1, 5 and 12, then decode",
)
FAULTS = [(last_column, {BATCH}), (first_token, {PREFILL, CHUNK, BATCH}), (one_branch, {PREFILL, CHUNK, BATCH})]


@pytest.mark.parametrize(("source", "precision"), [("genai", "fp32"), ("mobius", "fp32"), *QUANTISED])
@pytest.mark.parametrize(("fault", "seen_by"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_faults_are_seen(
    fault: Any, seen_by: set[str], source: str, precision: str, exported: Exported, random_maps: Maps, tmp_path: Path
) -> None:
    directory = ship(exported("llama", source, precision), tmp_path, random_maps(2))["nbl"]
    plant(directory, fault)
    failed = [r.detail for r in held(directory, precision) if not r.passed]
    assert {name for name in (PREFILL, CHUNK, BATCH) if any(d.startswith(name) for d in failed)} == seen_by
    assert difference(directory) != ""


# -- runtimes and readers ----------------------------------------------------------------------------------


def test_rows_padded_on_the_left_are_those_of_the_whole_graph(
    exported: Exported, random_maps: Maps, tmp_path: Path
) -> None:
    """What GroupQueryAttention makes of left padding is its own; the last column is gathered from it all the same."""
    for source in ("genai", "mobius"):
        directory = ship(exported("llama", source), tmp_path / source, random_maps(2))["nbl"]
        valid = (np.arange(12) >= 12 - np.array(BATCH_LENGTHS)[:, None]).astype(np.int64)
        ids = np.random.default_rng(2).integers(2, VOCAB, valid.shape) * valid
        found = []
        for name in (ALL_LOGITS_FILE, "model.onnx"):
            decoder = OnnxDecoder(directory, HEAD_DIM, file=name)
            decoder.begin(3)
            found.append(decoder.step(ids, valid)[:, -1])
        np.testing.assert_allclose(found[1], found[0], atol=1e-5)


def speak(directory: Path, prompts: list[list[int]], **search: Any) -> list[list[int]]:
    import onnxruntime_genai as og

    model = og.Model(str(directory))
    params = og.GeneratorParams(model)
    width = max(map(len, prompts))
    params.set_search_options(max_length=width + 8, batch_size=len(prompts), do_sample=False, **search)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([[*p, *[1] * (width - len(p))] for p in prompts], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(b).tolist() for b in range(len(prompts))]


@pytest.mark.parametrize("search", [{}, {"num_beams": 3, "past_present_share_buffer": False}], ids=["greedy", "beams"])
def test_batches_and_beams_in_the_generation_runtime(
    search: dict[str, Any], exported: Exported, random_maps: Maps, tmp_path: Path
) -> None:
    """Prompts of three lengths: GenAI says the same with both graphs."""
    last = ship(exported("llama"), tmp_path, random_maps(2))["nbl"]
    every = Path(shutil.copytree(last, tmp_path / "every"))
    shutil.move(every / ALL_LOGITS_FILE, every / "model.onnx")
    prompts = [ROW[k : k + n] for k, n in enumerate((3, 7, 12))]
    said = speak(last, prompts, **search)
    assert said == speak(every, prompts, **search)
    assert len({tuple(text[12:]) for text in said}) > 1 and all(len(text) > 12 for text in said)


def test_runtimes_do_not_look_at_the_second_graph(exported: Exported, random_maps: Maps, tmp_path: Path) -> None:
    directory = ship(exported("llama"), tmp_path, random_maps(2))["nbl"]
    with ORT.open_runner(directory) as runner:
        said = runner.greedy(ROW, 8)
    (directory / ALL_LOGITS_FILE).write_bytes(b"not a graph")
    with ORT.open_runner(directory) as runner:
        assert runner.greedy(ROW, 8) == said
    OnnxDecoder(directory, HEAD_DIM)


def test_scores_take_the_graph_with_all_logits(exported: Exported, random_maps: Maps, tmp_path: Path) -> None:
    directory = ship(exported("llama"), tmp_path, random_maps(2))["nbl"]
    graph_scorer(directory)
    (directory / ALL_LOGITS_FILE).unlink()
    with pytest.raises(
        NblError, match=r"keep all_logits\.onnx beside the graph, or export with the key logits = 'all'"
    ):
        graph_scorer(directory)


def test_a_tail_that_cannot_be_pruned_changes_nothing(exported: Exported, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(exported("llama"), tmp_path / "original"))
    model = ir.load(directory / "model.onnx")
    hidden = next(n for n in model.graph if n.name == "/lm_head/MatMul").inputs[0]
    assert hidden is not None
    model.graph.outputs.append(hidden)
    ir.save(model, directory / "model.onnx")
    before = (directory / "model.onnx").read_bytes()
    with pytest.raises(RefusalError, match="use the key logits = 'all'"):
        keep_last_token(directory)
    assert (directory / "model.onnx").read_bytes() == before
    assert not (directory / ALL_LOGITS_FILE).exists()


# -- the job -----------------------------------------------------------------------------------------------


class Alike:
    """Logits that hardly differ by token; of a last token alone, if `wrong`, those of the most similar one before."""

    table = 1 + 1e-6 * np.random.default_rng(0).standard_normal((VOCAB, 50))

    def __init__(self, *, last: bool = False, wrong: bool = False) -> None:
        self.last, self.wrong = last, wrong

    def begin(self, batch: int) -> None:
        pass

    def step(self, ids_BT: np.ndarray, valid_BT: np.ndarray) -> np.ndarray:
        found_BTV: np.ndarray = self.table[ids_BT]
        if not self.last:
            return found_BTV
        rows = [found_TV[: valid_T.sum()] for found_TV, valid_T in zip(found_BTV, valid_BT, strict=True)]
        return np.stack([self._last(row_TV)[None] for row_TV in rows])

    def _last(self, row_TV: np.ndarray) -> np.ndarray:
        last_V: np.ndarray = row_TV[-1]
        if not self.wrong or len(row_TV) == 1:
            return last_V
        return min(row_TV[:-1], key=lambda other_V: float(np.square(other_V - last_V).sum()))


@pytest.mark.parametrize("wrong", [False, True])
def test_the_logits_of_another_token_fail_however_alike_they_are(wrong: bool) -> None:
    """They are within the usual limit of the right ones, and not within half their distance."""
    limit, row = TOLERANCES["fp32"].limit, range(2, 42)
    results = check_last("nbl", expected_last(Alike(), row, limit), Alike(last=True, wrong=wrong), row)
    assert [r.passed for r in results] == [not wrong] * 3
    assert all(r.value is not None and r.value < limit for r in results)


def test_last_by_default_and_recorded(finished: Path) -> None:
    for name in ("nbl.json", "model/nbl.json", "report.json"):
        assert json.loads((finished / name).read_text())["logits"] == "last", name
    checks = json.loads((finished / "verify.json").read_text())["checks"]
    assert [(r["subject"], r["passed"]) for r in checks if r["check"] == "last_token"] == [("original", True)] * 3 + [
        ("nbl", True)
    ] * 3
    assert "logits of the last token alone" in (finished / "report.md").read_text()


def test_all_logits_on_request(run: Path, same: tuple[object, ...]) -> None:
    """A run of the default kind is made anew from the decoder on; nothing of the pruned graphs is left."""
    done = nbl(*same, "--output", run, *configured(logits="all"))
    assert done.status == 0, done.err
    assert "calibrate: reused" in done.err
    for name in ("original", "model"):
        assert not (run / name / ALL_LOGITS_FILE).exists()
        assert OnnxDecoder(run / name, HEAD_DIM).contract.logits == "all"
    assert not [r for r in json.loads((run / "verify.json").read_text())["checks"] if r["check"] == "last_token"]
    assert json.loads((run / "report.json").read_text())["logits"] == "all"
    assert_refused(nbl(*same, "--output", run, *configured(logits="some")), 2, "key logits")
