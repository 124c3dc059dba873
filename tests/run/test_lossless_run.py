"""`--draft`: a folder that gives the original's tokens, its figures, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import pytest
from gguf import GGUFReader, quants

from nbl_export.errors import RefusalError
from nbl_export.graph.names import draft_file
from nbl_export.graph.quantised import quantised_matrices
from nbl_export.options.options import JobOptions
from nbl_export.records.inputs import Lazy
from nbl_export.rewrite import quantize
from nbl_export.run.progress import Ui
from nbl_export.run.resolve import Resolver
from nbl_export.run.stages import speculative as speculative_stage
from nbl_export.run.stages.common import Place
from nbl_export.run_directory import RunDirectory
from nbl_export.targets.onnx.genai import GenaiRunner
from nbl_export.targets.onnx.speculative import SpeculativeRunner

from ..command import TINY, Outcome, assert_refused, nbl, snapshot
from ..gguf_kinds import HALVES, every_token, save_mixed
from ..jobs import resolver_of, until
from ..tiny import LAYERS


@pytest.fixture(scope="module")
def lossless(
    finished: Path, same: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Outcome]:
    """A finished run, and the same command with --draft auto. Never write to the run."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("lossless") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculative_stage, "LOADS", 5)  # as a user's job: `light_jobs` has 2, too few for an interval
        done = nbl(*same, "--draft", "auto", "--draft-layers", "0,2", "--output", run)
    assert done.status == 0, done.err
    return run, done


def test_earlier_stages_are_reused(lossless: tuple[Path, Outcome], finished: Path) -> None:
    run, done = lossless
    assert "bench: reused" in done.err
    assert "lossless decoding: done" in done.err
    before, after = snapshot(finished), snapshot(run)
    kept = {name for name in before if name.partition("/")[0] in ("original", "model")}
    assert all(after[name] == before[name] for name in kept)


def test_the_folder_gives_the_originals_tokens(lossless: tuple[Path, Outcome]) -> None:
    run, _ = lossless
    with GenaiRunner(run / "original", 1) as plain, SpeculativeRunner(run / "lossless", 1) as runner:
        for text in ("The assert statement", "import os", "a"):
            ids = plain.encode(text, chat=False)
            assert runner.greedy(ids, 24) == plain.greedy(ids, 24)


def test_the_figures(lossless: tuple[Path, Outcome]) -> None:
    """Every kind of prompt for the best of each draft; all answers equal; the chosen draft is what lies there."""
    run, _ = lossless
    found = json.loads((run / "lossless.json").read_text(encoding="utf-8"))
    drafts = {row["proposer"].partition(",")[0] for row in found["rows"]}
    assert drafts == {"ngram", "int4", "nbl"}
    assert {row["kind"] for row in found["rows"]} == {"prose", "code", "chat", "summary"}
    assert all(row["equal"] + _differing(found, row) == row["prompts"] == 5 for row in found["rows"])
    assert all(check["passed"] for check in found["checks"])
    assert len(found["trial"]) == 9
    best = found["overall"][0]
    assert best["ratio"] == max(row["ratio"] for row in found["overall"])
    assert found["chosen"]["name"] == best["proposer"]
    assert found["pays"] == (best["low"] > 1)
    drafts_there = [name for name in ("int4", "nbl") if (run / "lossless" / draft_file(name)).exists()]
    assert drafts_there == [d for d in ("int4", "nbl") if d == found["chosen"]["draft"]]
    facts = json.loads((run / "lossless" / "nbl.json").read_text(encoding="utf-8"))
    assert facts["lossless"] == found["chosen"]


def _differing(found: dict[str, object], row: dict[str, object]) -> int:
    same = ("proposer", "kind")
    return sum(all(d[k] == row[k] for k in same) for d in found["differences"])  # type: ignore[attr-defined]


def test_the_report_has_the_figures(lossless: tuple[Path, Outcome]) -> None:
    """A line for each proposer and kind of prompt, with the figures of lossless.json."""
    run, _ = lossless
    found = json.loads((run / "lossless.json").read_text(encoding="utf-8"))
    page = (run / "report.md").read_text(encoding="utf-8")
    section = page.partition("## Lossless decoding")[2].partition("#")[0]
    _, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if "|" in line)
    expected = [
        (row["proposer"], row["ratio"], row["low"], row["high"], f"{row['equal']} of {row['prompts']}")
        for row in (*found["rows"], *found["overall"])
    ]
    assert len(lines) == len(expected) == 3 * 5
    for (proposer, *_, ratio, interval, equal), (name, value, low, high, answers) in zip(lines, expected, strict=True):
        assert (proposer, equal) == (name, answers)
        assert [float(end) for end in interval.split(" to ")] == pytest.approx([low, high], abs=0.0051)
        if low <= 1 <= high:
            assert ratio == "no clear difference"
        else:
            assert float(ratio.removeprefix("×")) == pytest.approx(value, abs=0.0051)


def test_generate_and_bench(lossless: tuple[Path, Outcome]) -> None:
    run, _ = lossless
    before = snapshot(run)
    said = nbl("generate", run, "The assert statement", "--lossless", "--max-new-tokens", 12)
    assert said.out == nbl("generate", run, "The assert statement", "--original", "--max-new-tokens", 12).out
    measured = nbl("bench", run, "--lossless", "--repetitions", 1, "--json")
    assert measured.status == 0, measured.err
    found = json.loads(measured.out)
    assert {row["kind"] for row in found["rows"]} == {"prose", "code", "chat", "summary"}
    assert all(row["prompts"] == 1 for row in found["rows"])
    assert snapshot(run) == before
    assert "×" in nbl("bench", run, "--lossless", "--repetitions", 1).out


def test_a_named_draft_is_the_only_one(run: Path, same: tuple[object, ...]) -> None:
    done = nbl(*same, "--draft", "ngram", "--output", run)
    assert done.status == 0, done.err
    found = json.loads((run / "lossless.json").read_text(encoding="utf-8"))
    assert {row["proposer"].partition(",")[0] for row in found["rows"]} == {"ngram"}
    assert not list((run / "lossless").glob("*draft*"))


def test_a_changed_file_is_refused(lossless: tuple[Path, Outcome], tmp_path: Path) -> None:
    run = Path(shutil.copytree(lossless[0], tmp_path / "run"))
    file = run / "lossless" / "model.onnx"
    file.write_bytes(file.read_bytes() + b"\0")
    assert_refused(nbl("generate", run, "a", "--lossless"), 1, file, "corrupted")


def test_requests_that_do_not_fit(run: Path, lossless: tuple[Path, Outcome]) -> None:
    done, _ = lossless
    assert_refused(nbl("generate", run, "a", "--lossless"), 1, "has no lossless/", "--draft auto")
    assert_refused(nbl("bench", run, "--lossless"), 1, "has no lossless/")
    assert_refused(nbl("bench", done, "--lossless", "--batch", "2"), 2, "one sequence")
    assert_refused(nbl("bench", done / "lossless"), 1, "bench RUN --lossless")
    assert nbl("generate", done, "a", "--lossless", "--original").status == 2
    assert nbl("bench", done, run, "--lossless").status == 2


class StopError(Exception):
    pass


def test_an_int4_draft_of_an_int4_decoder_is_warned_of(tmp_path: Path) -> None:
    def stop() -> Any:
        raise StopError

    for precision, warned in (("int4", True), ("fp32", False)):
        said: list[str] = []
        place: Any = SimpleNamespace(ui=SimpleNamespace(say=said.append), run=SimpleNamespace(path=tmp_path))
        inputs: Any = SimpleNamespace(precision=precision, draft="int4", engine=Lazy(None, stop))
        with pytest.raises(StopError):
            speculative_stage.run(inputs, place, tmp_path)
        assert [("cannot make it faster" in line) for line in said] == [True] * warned


FOUR_BITS = dict.fromkeys(
    ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "token_embd"), "Q4_0"
)


@pytest.fixture(scope="module")
def of_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a GGUF up to its decoder graph, beside the file. Never write to it."""
    home = tmp_path_factory.mktemp("gguf")
    model, text = save_mixed(home / "m.gguf", FOUR_BITS), every_token(home / "text.txt", 12_000)
    given = ("--model", model, "--calibration", text, *TINY, "--calibration-tokens", "4096", "--draft", "int4")
    with until("decoder"):
        done = nbl(*given, "--output", home / "run")
    assert done.status == 0, done.err
    return home / "run"


@pytest.mark.parametrize("fit", [True, False], ids=["fit", "refused"])
def test_a_draft_of_a_gguf_has_the_codes_of_the_file(
    fit: bool, of_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft of a float32 target has the target's own values; codes that a graph cannot have leave an int4 draft."""
    model, out, said = of_gguf.with_name("m.gguf"), tmp_path / "out", list[str]()
    shutil.copytree(of_gguf, tmp_path / "run")
    out.mkdir()
    if not fit:
        monkeypatch.setattr(quantize, "take_codes", mock.Mock(side_effect=RefusalError(None, "planted")))
    with RunDirectory.open_run(tmp_path / "run", create=False) as run:
        resolver = Resolver(JobOptions.from_json(run.manifest["options"]), run, Ui(quiet=True))
        monkeypatch.setattr(resolver.ui, "say", said.append)
        inputs = speculative_stage.declare(resolver)
        assert isinstance(inputs, speculative_stage.SpeculativeInputs)
        speculative_stage.run(inputs, Place(run, resolver.ui), out)
    assert any("do not fit: planted" in line for line in said) is not fit
    row = json.loads((out / "lossless.json").read_text(encoding="utf-8"))["overall"][0]
    assert row["equal"] == row["prompts"] == 8
    graph = ir.load(out / "lossless" / draft_file("int4")).graph
    drafted = [matrix.blocks().coded for matrix in quantised_matrices(graph).values()]
    downs = [t for t in GGUFReader(model).tensors if "ffn_down" in t.name]
    assert len(downs) == LAYERS
    for down in downs:
        values = quants.dequantize(down.data, down.tensor_type)
        assert any(np.array_equal(values, matrix) for matrix in drafted) is fit


@pytest.mark.parametrize(
    ("changed", "requantize", "taken"),
    [({}, False, True), ({}, True, False), (dict.fromkeys(FOUR_BITS, "Q8_0"), False, False),
     ({"ffn_up": "IQ4_NL"}, False, False)],
    ids=["codes", "requantize", "eight bits", "unknown"],
)  # fmt: skip
def test_codes_make_a_draft_where_they_are_few_and_known(
    changed: dict[str, str], requantize: bool, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HALVES, "IQ4_NL", {0: 1.5e-3})
    model = save_mixed(tmp_path / "m.gguf", {**FOUR_BITS, **changed})
    resolver = resolver_of(tmp_path, {"draft": "int4", "requantize": requantize})
    resolver.source.gguf = model
    inputs = speculative_stage.declare(resolver)
    assert isinstance(inputs, speculative_stage.SpeculativeInputs)
    assert inputs.codes.value == (model if taken else None)


def test_other_tokens_are_a_failed_verification(
    run: Path, same: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a decoder that verifies against positions that are one off."""
    from nbl_export.rewrite.integers import Integers

    right = Integers.constant

    def wrong(self: Integers, name: str, values: list[int]) -> object:
        return right(self, name, [-1] if name == "end" else values)

    monkeypatch.setattr(Integers, "constant", wrong)
    before = snapshot(run)
    outcome = nbl(*same, "--draft", "ngram", "--output", run)
    assert outcome.status == 3
    assert "lossless decoding is not the original's" in outcome.err
    assert not (run / "lossless").exists()
    assert {k: v for k, v in snapshot(run).items() if k != "nbl.json"} == {
        k: v for k, v in before.items() if k != "nbl.json"
    }
