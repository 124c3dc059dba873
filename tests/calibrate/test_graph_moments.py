"""A job on a model that is nothing but a decoder graph: moments, plan, rewrite, verification without torch weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nbl_export.calibrate import collect
from nbl_export.calibrate.collect import GraphCollection
from nbl_export.graph.graph_only import read_spec
from nbl_export.mixers.linear import LINEAR, Linear
from nbl_export.model.checkpoint.load import load_model, load_tokenizer
from nbl_export.records.plan import TAPS
from nbl_export.text import corpus
from nbl_export.text import windows as text_windows

from ..command import TINY, assert_refused, nbl, snapshot, stage_lines
from ..jobs import until
from ..tiny import LAYERS

RELATIVE = 1e-4  # of the largest entry of a map
Given = Callable[[str], Path]


@pytest.fixture(scope="module")
def windows(checkpoint: Any, text: Path) -> Any:
    return text_windows.pack(corpus.read_text(str(text)), load_tokenizer(checkpoint("llama")), 4096, 64)[0]


@pytest.fixture(scope="module")
def torch_maps(checkpoint: Any, windows: Any) -> dict[str, list[Linear]]:
    found = collect.collect(load_model(checkpoint("llama")), windows, lambda _d, _t: None, TAPS)
    return {tap: [LINEAR.fit(m, i) for i, m in moments.items()] for tap, moments in found.items()}


def graph_maps(graph: Path, windows: Any) -> dict[str, list[Linear]]:
    with GraphCollection(graph, read_spec(graph), TAPS) as found:
        found.refer(windows)
        for batch in collect.batches(windows):
            found.add(batch)
        sums = [found.layer(i) for i in range(LAYERS)]
    return {tap: [LINEAR.fit(layer[tap].moments(), i) for i, layer in enumerate(sums)] for tap in TAPS}


def distance(one: Linear, other: Linear) -> float:
    parts = ((one.weight, other.weight), (one.bias, other.bias))
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in parts)


@pytest.mark.parametrize(
    "source",
    [
        "genai-fp32",
        "mobius-default",
        "mobius-cpu",
        "torchscript",
        pytest.param("transformers-23", marks=pytest.mark.fuzz),
    ],
)
def test_maps_are_those_of_torch(source: str, given_graph: Given, windows: Any, torch_maps: Any) -> None:
    found = graph_maps(given_graph(source) / "model.onnx", windows)
    for tap in TAPS:
        assert max(map(distance, found[tap], torch_maps[tap])) < RELATIVE
    assert distance(found["normed"][1], torch_maps["residual"][1]) > 100 * RELATIVE
    assert distance(found["residual"][1], torch_maps["residual"][2]) > 100 * RELATIVE


@pytest.fixture(scope="module")
def alone(given_graph: Given, text: Path) -> tuple[object, ...]:
    return ("--model", given_graph("genai-fp32"), "--calibration", text, *TINY)


@pytest.fixture(scope="module")
def graph_run(alone: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a graph alone. Never write to it."""
    output = tmp_path_factory.mktemp("graph") / "run"
    done = nbl(*alone, "--layers", "1", "--output", output)
    assert done.status == 0, done.err
    return output


def test_whole_job_on_a_graph_alone(graph_run: Path, given_graph: Given) -> None:
    verify = json.loads((graph_run / "verify.json").read_text(encoding="utf-8"))
    assert verify["passed"]
    assert {r["check"] for r in verify["checks"]} == {"structure", "original", "nbl", "text", "last_token"}
    assert len(verify["quality_loss"]) == 2
    facts = json.loads((graph_run / "nbl.json").read_text(encoding="utf-8"))
    assert (facts["options"]["decoder_source"], facts["status"]) == ("given", "verified")
    assert (graph_run / "original" / "all_logits.onnx").read_bytes() == (
        given_graph("genai-fp32") / "model.onnx"
    ).read_bytes()
    assert (graph_run / "bench.json").is_file() and (graph_run / "report.html").is_file()


def test_plan_is_that_of_the_torch_model(graph_run: Path, run: Path) -> None:
    """`run` has the same checkpoint, text and options. A graph takes a quarter of the layers, by bounds."""
    assert nbl("plan", run, "--layers", "1", "--select", "cca").status == 0
    one, other = (json.loads((d / "nbl.json").read_text(encoding="utf-8")) for d in (graph_run, run))
    assert one["replaced_layers"] == other["replaced_layers"]
    ours, theirs = ([score["bound"] for score in facts["scores"]] for facts in (one, other))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    found, wanted = (load_file(d / "maps.safetensors") for d in (graph_run, run))
    assert all(np.abs(found[k] - wanted[k]).max() < RELATIVE * np.abs(wanted[k]).max() for k in wanted)


def test_second_run_reuses(graph_run: Path, alone: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(graph_run, tmp_path / "run"))
    again = nbl(*alone, "--layers", "1", "--output", copy)
    assert set(stage_lines(again).values()) == {"reused"}, again.err


def test_a_wrong_rewrite_fails(graph_run: Path, tmp_path: Path) -> None:
    """Check nbl does not lean on the rewrite: a shipped map that is not the fitted one is seen in the logits."""
    import onnx_ir as ir

    run = Path(shutil.copytree(graph_run, tmp_path / "run"))
    facts = json.loads((run / "nbl.json").read_text(encoding="utf-8"))
    path = run / "model" / "all_logits.onnx"
    model = ir.load(path)
    product = next(node for node in model.graph if (node.name or "").startswith("/nbl/layers."))
    skip = next(node for node in model.graph if node.op_type == "Add" and node.name and "/nbl/" in node.name)
    skip.replace_input_with(0, product.inputs[0])
    ir.save(model, path)
    assert any(r["check"] == "nbl" and not r["passed"] for r in _climbed(run, facts["options"]))


def test_more_threads_than_one_are_a_number_to_the_runtime(graph_run: Path) -> None:
    facts = json.loads((graph_run / "nbl.json").read_text(encoding="utf-8"))
    checks = _climbed(graph_run, {**facts["options"], "threads": [2]})
    assert {"structure", "original", "nbl", "text"} <= {r["check"] for r in checks} and all(r["passed"] for r in checks)


def test_a_quantised_graph_is_proven_through_its_twin(exported: Any, text: Path, tmp_path: Path) -> None:
    """Without a torch model: the maps as they are stored, in the float32 twin of the graph as it came."""
    model = exported("llama", "genai", "int4")
    with until("verify"):
        done = nbl("--model", model, "--calibration", text, *TINY, "--layers", "1,2", "--output", tmp_path / "run")
    assert done.status == 0, done.err
    found = json.loads((tmp_path / "run" / "verify.json").read_text(encoding="utf-8"))
    compared = [r for r in found["checks"] if r["check"] == "nbl" and "logit" in r["metric"]]
    assert {r["tolerance"] for r in compared} == {1e-3} and max(r["value"] for r in compared) < 2e-5
    assert {"the input graph" in sentence for sentence in found["proof"][:1]} == {True}


def _climbed(run: Path, options: dict[str, Any]) -> list[dict[str, Any]]:

    from nbl_export.options.options import JobOptions
    from nbl_export.run.progress import Ui
    from nbl_export.run.resolve import Resolver
    from nbl_export.run.stages import verify
    from nbl_export.run.stages.common import Place
    from nbl_export.run_directory import RunDirectory

    with RunDirectory.open_run(run, create=False) as opened:
        resolver = Resolver(JobOptions.from_json(options), opened, Ui(quiet=True))
        inputs, place = verify.declare(resolver), Place(opened, resolver.ui)
        found: list[dict[str, Any]] = verify.check(inputs, place, run)["checks"]
        return found


def test_graph_of_another_exporter_is_calibrated_and_rewritten(
    given_graph: Given, checkpoint: Any, text: Path, tmp_path: Path
) -> None:
    """Caches of other names: the main job says how to go on, and that works."""
    model = tmp_path / "model"
    shutil.copytree(given_graph("transformers-23"), model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(checkpoint("llama") / name, model / name)
    alone = ("--model", model, "--calibration", text, *TINY, "--layers", "1", "--output", tmp_path / "run")
    assert_refused(nbl(*alone), 1, "past_key_values.layers.0.keys", "nbl-export plan RUN")
    assert nbl("plan", tmp_path / "run").status == 0
    maps, out = tmp_path / "run" / "maps.safetensors", tmp_path / "out"
    done = nbl("rewrite-graph", model, "--maps", maps, "--output", out)
    assert done.status == 0, done.err


def test_what_needs_torch_is_refused(alone: tuple[object, ...], given_graph: Given, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert_refused(nbl(*alone, "--fit", "distilled", "--output", output), 2, "--fit distilled needs the torch model")
    assert_refused(nbl(*alone, "--precision", "int4", "--output", output), 2, "--precision int4", "is fp32")
    assert not output.exists()


def test_options_of_a_finished_run_stay_possible(graph_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(graph_run, tmp_path / "run"))
    before = snapshot(run)
    assert_refused(nbl("rewrite", run, "--precision", "int4"), 2, "--precision int4")
    asked = ("--to", "transformers", "--output", run.with_name("saved"))
    assert_refused(nbl("convert", run, *asked), 1, "is an ONNX graph")
    assert snapshot(run) == before


def test_a_graph_without_tokenizer_or_already_rewritten(given_graph: Given, graph_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert_refused(nbl("--model", given_graph("torchscript"), "--output", output), 1, "no tokenizer")
    assert_refused(nbl("--model", graph_run / "model", "--output", output), 1, "logits of all tokens")
    rewritten = graph_run / "model" / "all_logits.onnx"
    assert_refused(nbl("--model", rewritten, "--output", output), 1, "only 2 of its 3 layers")
    assert not output.exists()
