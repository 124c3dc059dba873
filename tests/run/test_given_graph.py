"""Graphs that somebody else exported: recognised without being told the exporter, rewritten, and right."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.methods.applied import linearize
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.maps_file import save_maps
from nbl_export.verify.ladder import DECODE_STEPS, run_rows

from ..command import assert_refused, in_new_process, nbl, snapshot
from ..damage import name_code, named_code
from ..exits import chunks_of, predicted_maps
from ..exits import torch_logits as exit_logits
from ..graph_sources import OPTIMUM_PYTHON
from ..tiny import HEAD_DIM, HIDDEN, LAYERS, VOCAB

pytestmark = [pytest.mark.job, pytest.mark.process]

# Largest logit difference by precision: the logits' own scale is 2 to 3; int8 and int4 round every weight.
TOLERANCE = {"fp32": 5e-5, "fp16": 0.01, "int8": 0.1, "int4": 0.6}
needs_optimum = pytest.mark.skipif(OPTIMUM_PYTHON is None, reason="NBL_OPTIMUM_PYTHON names no environment")
SOURCES = [
    "genai-fp32", "genai-fp16", "genai-int8", "genai-int4", "mobius-default", "mobius-cpu", "mobius-fp16",
    pytest.param("transformers-20", marks=pytest.mark.fuzz),
    pytest.param("transformers-20-fused-positions", marks=pytest.mark.fuzz), "transformers-23",
    "torchscript",
    pytest.param("optimum", marks=needs_optimum),
]  # fmt: skip
CHOICES = [((0, 1), "residual"), ((0, 2), "normed"), ((1,), "residual")]

Given = Callable[[str], Path]


def precision(source: str) -> str:
    return next((p for p in TOLERANCE if source.endswith(p)), "fp32")


def rows() -> list[list[int]]:
    """Two of different length."""
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCAB, n + DECODE_STEPS).tolist() for n in (29, 11)]


def torch_logits(checkpoint: Path, maps: dict[int, Linear], tap: str) -> list[np.ndarray]:
    model = linearize(load_model(checkpoint), maps, tap)
    with torch.inference_mode():
        return [model(torch.tensor([row]), use_cache=False).logits[0].numpy() for row in rows()]


def graph_logits(directory: Path) -> list[list[np.ndarray]]:
    """Each row by itself, and as a padded batch where the graph can be told positions (or derives them from a mask)."""
    stated = json.loads((directory / "nbl.json").read_text(encoding="utf-8"))["caches"]
    decoder = OnnxDecoder(directory, HEAD_DIM, caches=stated)
    alone = [run_rows(decoder, [row])[0] for row in rows()]
    nodes = {node.op_type for node in ir.load(directory / "model.onnx").graph}
    told = "position_ids" in {info.name for info in decoder.contract.inputs}
    return [alone, run_rows(decoder, rows())] if told or "GroupQueryAttention" in nodes else [alone]


def worst(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(float(np.abs(g - e).max()) for g, e in zip(got, expected, strict=True))


@pytest.fixture
def maps_file(random_maps: Callable[..., dict[int, Linear]], tmp_path: Path) -> Callable[..., Path]:
    def make(*layers: int, tap: str = "residual") -> Path:
        path = tmp_path / "maps.safetensors"
        save_maps(random_maps(*layers), path, tap)
        return path

    return make


@pytest.mark.parametrize("source", SOURCES)
def test_rewritten_graph_agrees_with_torch(
    source: str, checkpoint: Any, given_graph: Given, maps_file: Any, random_maps: Any, tmp_path: Path
) -> None:
    """Prefill and cached steps; replaced caches gone, the others as they were; the input untouched."""
    before = snapshot(given_graph(source))
    for number, (replaced, tap) in enumerate(CHOICES):
        out = tmp_path / str(number)
        done = nbl("rewrite-graph", given_graph(source), "--maps", maps_file(*replaced, tap=tap), "--output", out)
        assert (done.status, done.out.strip()) == (0, str(out)), done.err
        assert snapshot(given_graph(source)) == before
        expected = torch_logits(checkpoint("llama"), random_maps(*replaced), tap)
        for got in graph_logits(out):
            assert worst(got, expected) < TOLERANCE[precision(source)], (replaced, tap)
        names = [str(v.name) for v in ir.load(out / "model.onnx").graph.inputs]
        caches = [name for name in names if name.startswith("past")]
        assert len(caches) == 2 * (LAYERS - len(replaced))
        assert not any(f".{layer}." in name for layer in replaced for name in caches)


@pytest.mark.parametrize("source", ["genai-fp32", "genai-fp16"])
def test_a_prompt_of_a_given_graph_stops_below_an_exit_layer(
    source: str, checkpoint: Any, given_graph: Given, tmp_path: Path
) -> None:
    """Its logits are those of the last token, all caches stay, and nbl.json has the exit layer."""
    maps, file, out = predicted_maps(1, 4, 2 * HEAD_DIM), tmp_path / "maps.safetensors", tmp_path / "out"
    save_maps(maps, file)
    done = nbl("rewrite-graph", given_graph(source), "--maps", file, "--output", out)
    assert done.status == 0, done.err
    facts = json.loads((out / "nbl.json").read_text(encoding="utf-8"))
    assert (facts["exit"], len(facts["caches"])) == ({"layer": 1, "recent_tokens": 4}, 2 * LAYERS)
    decoder, chunks = OnnxDecoder(out, HEAD_DIM, caches=facts["caches"]), chunks_of((20, 1, 1, 9, 1))
    decoder.begin(1)
    for chunk, right in zip(chunks, exit_logits(load_model(checkpoint("llama")), maps, chunks), strict=True):
        found = decoder.step(chunk)
        assert found.shape == (1, 1, VOCAB)
        assert worst([found[0, 0]], [right[-1]]) < TOLERANCE[precision(source)]
    again = nbl("rewrite-graph", out, "--maps", file, "--output", tmp_path / "again")
    assert_refused(again, 1, "an exit layer needs the logits of all tokens")


def test_what_is_replaced_shows(
    checkpoint: Any, given_graph: Given, random_maps: Any, maps_file: Any, tmp_path: Path
) -> None:
    """The tolerances of the test above tell the right map from another one."""
    out = tmp_path / "out"
    nbl("rewrite-graph", given_graph("genai-int4"), "--maps", maps_file(0, 1), "--output", out)
    wrong = torch_logits(checkpoint("llama"), {0: random_maps(1)[1], 1: random_maps(0)[0]}, "residual")
    assert worst(graph_logits(out)[0], wrong) > 2 * TOLERANCE["int4"]


def test_command_needs_no_torch(given_graph: Given, maps_file: Any, tmp_path: Path) -> None:
    code = "sys.modules['torch'] = sys.modules['transformers'] = None"
    arguments = ("rewrite-graph", given_graph("torchscript"), "--maps", maps_file(1), "--output", tmp_path / "out")
    done = in_new_process(*arguments, code=code)
    assert done.status == 0, done.err
    assert in_new_process("inspect", tmp_path / "out", "--json", code=code).status == 0


def test_directory_is_carried_over(
    given_graph: Given, maps_file: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """But for code and pickles, and the settings that name code."""
    source, out = copied(given_graph("genai-fp32"), tmp_path / "source"), tmp_path / "new" / "out"
    for name in ("onnx/model.onnx_data", "LICENSE", "README.md"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("mine", encoding="utf-8")
    carried = snapshot(source)
    refused_names = ("evil.py", "onnx/evil.so", "evil.so.1", "weights.pkl", "pytorch_model.bin", "onnx/x.onnx.py")
    for name in refused_names:
        (source / name).write_text("evil", encoding="utf-8")
    name_code(source)
    done = nbl("rewrite-graph", source, "--maps", maps_file(0, 2), "--layers", "2,", "--output", out)
    assert done.status == 0, done.err
    assert all(name in caplog.text for name in refused_names)
    assert sorted(snapshot(out)) == sorted({*carried, "nbl.json"})
    assert not named_code(out)
    same = ("genai_config.json", "tokenizer.json")
    assert all((source / name).read_bytes() == (out / name).read_bytes() for name in same)
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    facts = json.loads((out / "nbl.json").read_text(encoding="utf-8"))
    assert (facts["replaced_layers"], facts["num_layers"], facts["tap"]) == ([2], LAYERS, "residual")
    assert list(facts["caches"]) == [f"past_key_values.{i}.{part}" for i in (0, 1) for part in ("key", "value")]


def test_a_run_directory_gives_its_maps(given_graph: Given, maps_file: Any, tmp_path: Path) -> None:
    source, maps = given_graph("genai-fp32"), maps_file(1)
    for name, given in (("file", maps), ("run", maps.parent)):
        assert nbl("rewrite-graph", source, "--maps", given, "--output", tmp_path / name).status == 0
    assert snapshot(tmp_path / "file") == snapshot(tmp_path / "run")
    maps.unlink()
    assert_refused(nbl("rewrite-graph", source, "--maps", maps.parent, "--output", tmp_path / "new"), 1, maps)
    maps.symlink_to(source / "config.json")
    assert_refused(nbl("rewrite-graph", source, "--maps", maps.parent, "--output", tmp_path / "new"), 1, maps, "link")


def test_genai_runs_what_comes_out(given_graph: Given, maps_file: Any, tmp_path: Path) -> None:
    nbl("rewrite-graph", given_graph("genai-fp32"), "--maps", maps_file(1), "--output", tmp_path / "out")
    done = nbl("generate", tmp_path / "out", "The", "--raw", "--max-new-tokens", "4")
    assert done.status == 0, done.err


def test_a_file_is_enough(given_graph: Given, maps_file: Any, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    file = tmp_path / "alone" / "decoder_with_past.onnx"
    file.write_bytes((given_graph("torchscript") / "model.onnx").read_bytes())
    (tmp_path / "alone" / "holiday.jpg").write_bytes(b"not for copying")
    done = nbl("rewrite-graph", file, "--maps", maps_file(1), "--output", tmp_path / "out")
    assert done.status == 0, done.err
    assert sorted(snapshot(tmp_path / "out")) == ["decoder_with_past.onnx", "nbl.json"]


def test_the_layout_of_the_hub(given_graph: Given, maps_file: Any, tmp_path: Path) -> None:
    """DIR/config.json and DIR/onnx/model.onnx."""
    hub, out = tmp_path / "hub", tmp_path / "out"
    (hub / "onnx").mkdir(parents=True)
    for name, place in (("model.onnx", hub / "onnx"), ("config.json", hub)):
        (place / name).write_bytes((given_graph("torchscript") / name).read_bytes())
    done = nbl("rewrite-graph", hub, "--maps", maps_file(1), "--output", out)
    assert done.status == 0, done.err
    assert sorted(snapshot(out)) == ["config.json", "nbl.json", "onnx/model.onnx"]
    assert json.loads(nbl("inspect", hub, "--json").out)["num_layers"] == LAYERS


def test_a_rewritten_graph_can_be_rewritten(given_graph: Given, maps_file: Any, tmp_path: Path) -> None:
    source = given_graph("transformers-23")
    nbl("rewrite-graph", source, "--maps", maps_file(0, 2), "--output", tmp_path / "once")
    nbl("rewrite-graph", source, "--maps", maps_file(2), "--output", tmp_path / "first")
    done = nbl("rewrite-graph", tmp_path / "first", "--maps", maps_file(0), "--output", tmp_path / "second")
    assert done.status == 0, done.err
    assert worst(graph_logits(tmp_path / "once")[0], graph_logits(tmp_path / "second")[0]) < TOLERANCE["fp32"]
    facts = json.loads((tmp_path / "second" / "nbl.json").read_text(encoding="utf-8"))
    assert facts["replaced_layers"] == [0, 2]


# -- refused, with nothing written -----------------------------------------------------------------------------


def refused(tmp_path: Path, *arguments: object, status: int = 1, parts: tuple[object, ...] = ()) -> None:
    before = snapshot(tmp_path)
    assert_refused(nbl("rewrite-graph", *arguments), status, *parts)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("source", ["mobius-default", "transformers-23", "torchscript"])
def test_attention_whose_keys_cannot_be_predicted(source: str, given_graph: Given, tmp_path: Path) -> None:
    save_maps(predicted_maps(1, 4, 2 * HEAD_DIM), tmp_path / "maps.safetensors")
    given = (given_graph(source), "--maps", tmp_path, "--output", tmp_path / "out")
    refused(tmp_path, *given, parts=("layer 1", "is no GroupQueryAttention, so it takes no other keys"))


def test_options_that_do_not_go_together(given_graph: Given, maps_file: Any, tmp_path: Path) -> None:
    graph, maps, out = given_graph("genai-fp32"), maps_file(1), tmp_path / "out"
    refused(tmp_path, graph, "--output", out, status=2, parts=("--maps",))
    refused(tmp_path, "--maps", maps, "--output", out, status=2, parts=("GRAPH",))
    given = (graph, "--maps", maps, "--output", out)
    refused(tmp_path, *given, "--precision", "int4", status=2, parts=("--precision",))
    refused(tmp_path, *given, "--layers", "1", parts=("is a count",))
    refused(tmp_path, *given, "--layers", "0,", parts=("no map of layer 0", "it has those of 1"))


def test_maps_that_do_not_fit(given_graph: Given, maps_file: Any, tmp_path: Path) -> None:
    graph, out = given_graph("transformers-23"), tmp_path / "out"
    refused(tmp_path, graph, "--maps", maps_file(0, 1, 2), "--output", out, parts=("one must stay",))
    refused(tmp_path, graph, "--maps", maps_file(7), "--output", out, parts=("layer 7", "layers 0 to 2"))
    small = Linear(np.eye(HIDDEN // 2, dtype="f"), np.ones(HIDDEN // 2, "f"))
    save_maps({1: small}, tmp_path / "small.safetensors")
    parts = ("layer 1 is for a width of 48", "is 96")
    refused(tmp_path, graph, "--maps", tmp_path / "small.safetensors", "--output", out, parts=parts)
    refused(tmp_path, graph, "--maps", graph / "config.json", "--output", out, parts=("not a maps file",))


def test_a_configuration_states_no_more_layers_than_decoders_have(
    given_graph: Given, maps_file: Any, tmp_path: Path
) -> None:
    graph = copied(given_graph("transformers-23"), tmp_path / "graph")
    config = json.loads((graph / "config.json").read_text(encoding="utf-8"))
    (graph / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1 << 40}), encoding="utf-8")
    parts = (f"states {1 << 40} layers",)
    refused(tmp_path, graph, "--maps", maps_file(1), "--output", tmp_path / "out", parts=parts)


def test_a_job_on_a_graph_names_the_command_for_graphs(given_graph: Given, tmp_path: Path) -> None:
    graph = given_graph("genai-fp32")
    for model in (graph, graph / "model.onnx"):
        refused_job = nbl("--model", model, "--output", tmp_path / "out")
        assert_refused(refused_job, 1, "is an ONNX graph", "nbl-export rewrite-graph")
    assert not (tmp_path / "out").exists()


def test_places_that_are_taken_or_missing(given_graph: Given, maps_file: Any, tmp_path: Path) -> None:
    graph, maps = given_graph("genai-fp32"), maps_file(1)
    refused(tmp_path, graph, "--maps", maps, "--output", tmp_path, parts=("is there already",))
    refused(tmp_path, graph, "--maps", maps, "--output", graph / "in", parts=("lies inside",))
    nowhere = tmp_path / "nowhere"
    refused(tmp_path, nowhere, "--maps", maps, "--output", tmp_path / "out", parts=("does not exist",))
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(b"")
    refused(tmp_path, tmp_path, "--maps", maps, "--output", tmp_path / "out" / "x",
            parts=("several graphs (a.onnx, b.onnx)",))  # fmt: skip


def copied(directory: Path, to: Path) -> Path:
    to.mkdir()
    for file in directory.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_damaged_graphs(given_graph: Given, maps_file: Any, tmp_path: Path) -> None:
    graph = copied(given_graph("genai-fp32"), tmp_path / "graph")
    given = (graph, "--maps", maps_file(1), "--output", tmp_path / "out")
    whole = (graph / "model.onnx.data").read_bytes()
    (graph / "model.onnx.data").write_bytes(whole[:-9])
    refused(tmp_path, *given, parts=("model.onnx.data ends before",))
    (graph / "model.onnx.data").unlink()
    refused(tmp_path, *given, parts=("model.onnx.data, which holds weights of model.onnx, is missing",))
    (tmp_path / "data").write_bytes(whole)
    (graph / "model.onnx.data").symlink_to(tmp_path / "data")
    refused(tmp_path, *given, parts=("is a link",))
    (graph / "model.onnx.data").unlink()
    (graph / "model.onnx.data").hardlink_to(tmp_path / "data")
    refused(tmp_path, *given, parts=("has a second name",))
    (graph / "model.onnx.data").unlink()
    (graph / "model.onnx.data").write_bytes(whole)
    text = (graph / "model.onnx").read_bytes()
    (graph / "model.onnx").write_bytes(text.replace(b"model.onnx.data", b"../../etc/other"))
    refused(tmp_path, *given, parts=("outside its directory",))
    (graph / "model.onnx").write_bytes(text[: len(text) // 2])
    refused(tmp_path, *given, parts=("not an ONNX model",))


_PEAK = """
import atexit, resource, sys
def say(): print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
atexit.register(say)
"""


@pytest.mark.large
def test_weights_of_two_gigabytes_pass_by(given_graph: Given, maps_file: Any, tmp_path: Path) -> None:
    """They are copied from file to file: the process stays below 1 GiB."""
    import onnx

    graph = Path(shutil.copytree(given_graph("genai-fp32"), tmp_path / "graph"))
    model = onnx.load(graph / "model.onnx", load_external_data=False)
    head = next(t for t in model.graph.initializer if t.name == "lm_head.MatMul.weight")
    tokens, begin = 9_000_000, 1 << 20
    size = HIDDEN * tokens * 4
    head.dims[1] = tokens
    del head.external_data[:]
    for key, value in (("location", "model.onnx.data"), ("offset", str(begin)), ("length", str(size))):
        head.external_data.add(key=key, value=value)
    os.truncate(graph / "model.onnx.data", begin + size)  # a hole in the file
    model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value = tokens
    onnx.save(model, graph / "model.onnx")
    given = ("rewrite-graph", graph, "--maps", maps_file(1), "--output", tmp_path / "out")
    done = in_new_process(*given, code=_PEAK)
    assert done.status == 0, done.err
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > size > 2 << 30
    assert int(done.err.split()[-1]) * 1024 < 1 << 30, done.err


# -- inspect ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_inspect_recognises(source: str, given_graph: Given) -> None:
    done = nbl("inspect", given_graph(source), "--json")
    assert done.status == 0, done.err
    facts = json.loads(done.out)
    assert (facts["num_layers"], facts["hidden_size"], facts["logits"]) == (LAYERS, HIDDEN, "all")
    assert [(layer["layer"], layer["taps"]) for layer in facts["layers"]] == [
        (layer, ["residual", "normed"]) for layer in range(LAYERS)
    ]
    assert all("key" in layer["caches"][0] and "value" in layer["caches"][1] for layer in facts["layers"])


def test_inspect_table(given_graph: Given, finished: Path) -> None:
    table = nbl("inspect", given_graph("mobius-cpu") / "model.onnx").out
    for part in ("3 layers, hidden size 96", "of all tokens", "0-2"):
        assert part in table
    rewritten = json.loads(nbl("inspect", finished / "model", "--json").out)
    assert (rewritten["logits"], len(rewritten["replaced_layers"]), len(rewritten["layers"])) == ("last", 1, LAYERS - 1)
    taps = [layer["taps"] for layer in rewritten["layers"]]
    assert taps == [["residual", "normed"], ["residual"]]  # the last one is joined on the last token alone
    assert "status" in json.loads(nbl("inspect", finished, "--json").out)


def test_inspect_says_what_stops_a_layer(given_graph: Given, tmp_path: Path) -> None:
    """A value of inside the attention that is also an output; the other layers are still fine."""
    graph = ir.load(given_graph("torchscript") / "model.onnx")
    block = next(node for node in graph.graph if node.op_type == "Softmax")
    block.outputs[0].shape, block.outputs[0].type = ir.Shape(["b", 4, "q", "k"]), ir.TensorType(ir.DataType.FLOAT)
    graph.graph.outputs.append(block.outputs[0])
    ir.save(graph, tmp_path / "model.onnx")
    facts = json.loads(nbl("inspect", tmp_path, "--json").out)
    assert [bool(layer["taps"]) for layer in facts["layers"]] == [False, True, True]
    assert "no residual addition gathers the attention output" in facts["layers"][0]["reason"]
