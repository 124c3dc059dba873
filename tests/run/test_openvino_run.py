"""Runs of the main job for OpenVINO, from the command line to the report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..command import TINY, assert_refused, nbl
from ..jobs import until
from ..tiny import HEAD_DIM

pytestmark = [pytest.mark.engine, pytest.mark.job]


@pytest.fixture(scope="module")
def asked(checkpoint: Callable[[str], Path], text: Path) -> tuple[object, ...]:
    return ("--engine", "openvino", "--model", checkpoint("llama"), "--calibration", text, *TINY)


@pytest.fixture(scope="module")
def runs(asked: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """precision -> a run: fp16 is finished, int8 is verified. Never write to it."""
    found = {}
    for precision in ("fp16", "int8"):
        output = tmp_path_factory.mktemp("openvino") / precision
        with until("report" if precision == "fp16" else "verify"):
            done = nbl(*asked, "--precision", precision, "--output", output)
        assert done.status == 0, done.err
        found[precision] = output
    return found


def checks(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "verify.json").read_text())["checks"]
    return found


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_run_is_verified_to_float32_accuracy_and_at_its_own_error(runs: dict[str, Path], precision: str) -> None:
    found = checks(runs[precision])
    exact = [r["value"] for r in found if r["check"] in ("original", "nbl")]
    shipped = [r["value"] for r in found if r["check"] == "shipped"]
    assert max(exact) < 1e-5 < max(shipped) < 0.1
    assert {r["metric"] for r in found if r["check"] == "structure"} >= {
        "contract", "cache bytes per token", "maps in the graph", "weights untouched",
        "what ships is the graph with all logits, pruned", "cache bytes in the running session",
    }  # fmt: skip
    facts = json.loads((runs[precision] / "nbl.json").read_text())
    assert facts["status"] == "verified" and facts["options"]["engine"] == "openvino"


def test_the_report_names_what_the_engine_computes_in(runs: dict[str, Path]) -> None:
    """Of int8: `test_generate_bench_and_inspect`."""
    bench = json.loads((runs["fp16"] / "bench.json").read_text())
    assert set(bench["arithmetic"]) == {"original", "nbl"}
    assert all(said.endswith("with keys and values in float16") for said in bench["arithmetic"].values())
    assert f"The engine {bench['arithmetic']['nbl']}." in (runs["fp16"] / "report.md").read_text()
    assert bench["variants"]["nbl"]["model_bytes"] > 100_000
    assert "faster" not in bench and "OTHER" not in (runs["fp16"] / "report.md").read_text()


def test_generate_bench_and_inspect(runs: dict[str, Path]) -> None:
    run = runs["int8"]
    for place in (run, run / "model"):
        done = nbl("generate", place, "The with statement", "--max-new-tokens", 4, "--raw")
        assert done.status == 0 and done.out.strip(), done.err
    short = ("--depth", 0, "--repetitions", 1, "--prompt-tokens", 16, "--generate-tokens", 4, "--json")
    done = nbl("bench", run / "model", "--against", run / "original", *short)
    assert done.status == 0, done.err
    variants = json.loads(done.out)["variants"]
    caches = {Path(v["path"]).name: v["kv_cache_bytes_per_token"] for v in variants.values()}
    assert caches == {"model": 2 * 2 * 2 * 16, "original": 3 * 2 * 2 * 16}  # layers x 2 x heads x size, one byte
    assert all(v["engine"] == "openvino" for v in variants.values())
    assert all("keys and values in 8 bits" in v["arithmetic"] for v in variants.values())
    assert "openvino" in nbl("inspect", run).out


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda model: (model / "openvino_model.bin").unlink(), "is missing"),
        (lambda model: (model / "tokenizer.json").write_text("{}"), "the tokenizer of"),
    ],
)
def test_a_damaged_directory_is_one_sentence(
    runs: dict[str, Path], tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    model = Path(shutil.copytree(runs["fp16"] / "model", tmp_path / "model"))
    damage(model)
    done = nbl("generate", model, "The with", "--max-new-tokens", 2, "--raw")
    assert_refused(done, 1, said)


def test_long_rotary_tables_are_refused(checkpoint: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    done = nbl("--engine", "openvino", "--model", checkpoint("phi3-long"), "--calibration", text, *TINY,
               "--output", tmp_path / "run")  # fmt: skip
    assert_refused(done, 1, "longrope", "--engine ort")


def test_scores_are_those_of_the_graph(runs: dict[str, Path]) -> None:
    """The graph of an IR directory, as `eval` opens it: contexts are shared, and going back changes little."""
    import numpy as np

    from nbl_export.evaluation.scorer import graph_scorer
    from nbl_export.targets.openvino.engine import OPENVINO

    assert graph_scorer(runs["int8"] / "model", 1).max_length == 512
    decoder = OPENVINO.open_graph(runs["int8"] / "model", HEAD_DIM, threads=1)
    decoder.begin(1)
    decoder.step(np.arange(2, 22)[None])
    mark = decoder.mark()
    first = decoder.step(np.arange(30, 34)[None])
    decoder.step(np.arange(50, 55)[None])
    decoder.rewind(mark)
    again = decoder.step(np.arange(30, 34)[None])
    assert first.shape[1] == 4
    assert np.sqrt(np.square(first - again).mean() / np.square(first).mean()) < 0.02
