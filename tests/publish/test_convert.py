"""`convert`: a run's model in the forms of other engines, and what these forms cannot hold."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from nbl_export.errors import CorruptError, NblError
from nbl_export.methods.applied import linearize
from nbl_export.methods.checkpoint import copied
from nbl_export.methods.checkpoint.copied import copy_linearized
from nbl_export.methods.checkpoint.hf_classes import save_linearized
from nbl_export.methods.checkpoint.load import load_model, materialise
from nbl_export.methods.checkpoint.source import resolve
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.maps_file import load_maps
from nbl_export.publish.checkpoint_check import CHECK_FILE
from nbl_export.publish.convert import convert
from nbl_export.records.destinations import DESTINATIONS
from nbl_export.run.progress import Ui
from nbl_export.targets.checkpoint import edge_llm, nemotron_nas

from ..command import TINY, assert_refused, configured, keys, nbl, snapshot
from ..damage import name_code, named_code
from ..jobs import until
from ..tiny import HIDDEN, SPLIT, random_map, save_checkpoint, save_gguf

pytestmark = pytest.mark.job

IDS = torch.arange(3, 40)[None]


NAS = {"intermediate_size": 256, **SPLIT}  # what the Nemotron-NAS form holds


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Verified runs: maps without a bias, and with a bias on the normed input."""
    model = save_checkpoint("llama", tmp_path_factory.mktemp("nas") / "model", **NAS)
    kinds = {"linear": configured(maps="linear"), "normed": configured(tap="normed")}
    found = {}
    for name, options in kinds.items():
        found[name] = tmp_path_factory.mktemp("runs") / name
        words = ("--model", model, "--calibration", text, *TINY, "--layers", "1,2", *options)
        with until("verify"):
            done = nbl(*words, "--output", found[name])
        assert done.status == 0, done.err
    return found


@pytest.fixture
def gguf_run(text: Path, tmp_path: Path) -> Path:
    """A finished run of a GGUF file, without a lock file."""
    model = save_gguf(tmp_path / "model.gguf")
    run = tmp_path / "run"
    done = nbl("--model", model, "--calibration", text, *TINY, "--layers", "1", "--output", run)
    assert done.status == 0, done.err
    (run / ".lock").unlink(missing_ok=True)
    return run


def matrices_in(directory: Path) -> dict[int, np.ndarray]:
    weights = load_file(directory / "model.safetensors")
    return {i: weights[f"model.layers.{i}.self_attn.linear_attn.weight"] for i in (1, 2)}


def test_linear_maps_are_written_as_they_are(runs: dict[str, Path], tmp_path: Path) -> None:
    done = nbl("convert", runs["linear"], "--to", "tensorrt-llm", "--output", tmp_path / "nas")
    assert (done.status, done.out) == (0, f"{tmp_path / 'nas'}\n"), done.err
    maps = load_maps(runs["linear"] / "maps.safetensors", (1, 2))
    for i, found in matrices_in(tmp_path / "nas").items():
        np.testing.assert_array_equal(found, maps[i].tensors()["weight"])
    assert not [p.name for p in runs["linear"].iterdir() if p.name.startswith(".nbl-export-")]


@pytest.mark.parametrize(
    ("form", "part"),
    [
        ("onnx", "--to is transformers, nemotron-nas, mlx, edge-llm"),
        ("gguf", "--to gguf is llama.cpp's own: its convert_hf_to_gguf.py"),
    ],
)
def test_forms_that_are_none(form: str, part: str, tmp_path: Path) -> None:
    assert_refused(nbl("convert", tmp_path, "--to", form, "--output", tmp_path / "out"), 2, part)


@pytest.mark.parametrize("kind", ["run", "linear", "normed"])
def test_a_run_goes_where_it_is_said_to_go(kind: str, run: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    """Two have maps with a bias, and the vocabulary of none is one of llama.cpp's converter."""
    directory = run if kind == "run" else runs[kind]
    said = nbl("convert", directory, "--json")
    assert said.status == 0, said.err
    refused = {route["name"]: route["reason"] for route in json.loads(said.out)}
    expected = {"cuda", "openvino", "trt", "trt-rtx", "llama.cpp"}
    expected |= set() if kind == "linear" else {"tensorrt-llm", "mlx-lm"}
    assert {name for name, reason in refused.items() if reason} == expected, refused
    if kind != "linear":
        assert "one matrix a layer on the normed input; make another run" in refused["tensorrt-llm"]
    for name, place in DESTINATIONS.items():
        if place.form:
            done = nbl("convert", directory, "--to", name, "--output", tmp_path / name)
            assert (done.status, (tmp_path / name).exists()) == ((1, False) if refused[name] else (0, True)), done.err


@pytest.mark.parametrize("kind", ["run", "normed"])
def test_a_checkpoint_is_checked_where_it_is_served(
    kind: str, run: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    """Predicted KV and linear layers. A map that is exchanged, and a weight of a kept layer that is, are found."""
    directory = run if kind == "run" else runs[kind]
    out = tmp_path / "checkpoint"
    done = nbl("convert", directory, "--to", "vllm", "--output", out)
    assert done.out.strip() == str(out) and f"vllm serve {out}" in done.err and f"verify {out}" in done.err
    found = nbl("verify", out, "--json")
    assert found.status == 0, found.err
    assert json.loads(found.out)["passed"] and json.loads(found.out)["value"] < 1e-5
    weights = load_file(out / "model.safetensors")
    mapped = next(name for name in weights if name.endswith("linear.weight"))
    for name in (mapped, "model.layers.0.mlp.up_proj.weight"):
        planted = {**weights, name: np.ascontiguousarray(weights[name][::-1])}
        save_file(planted, out / "model.safetensors", {"format": "pt"})
        assert_refused(nbl("verify", out), 3, "does not compute what the run's model computes")


def test_a_checkpoint_that_cannot_be_checked(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "checkpoint"
    assert nbl("convert", runs["linear"], "--to", "vllm", "--output", out).status == 0
    expected = json.loads((out / CHECK_FILE).read_text(encoding="utf-8"))
    for change, part in (
        ({"ids": [-1, *expected["ids"]]}, "negative"),
        ({"positions": [*expected["positions"][1:], 10_000]}, "a position is not there"),
        ({"columns": expected["columns"][1:]}, "shapes do not match"),
        ({"logits": "many"}, "cannot be read"),
        ({"ids": [10**6, *expected["ids"][1:]]}, "names token 1000000"),
    ):
        (out / CHECK_FILE).write_text(json.dumps({**expected, **change}), encoding="utf-8")
        assert_refused(nbl("verify", out), 1, CHECK_FILE, part)
    (out / CHECK_FILE).unlink()
    assert_refused(nbl("verify", out), 1, f"has no {CHECK_FILE}", "convert the run again")
    assert_refused(nbl("verify", out, "--device", "cpu"), 2, "is a checkpoint, which takes no options of a run")


def test_a_run_that_is_only_readable_is_converted(gguf_run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Its weights, which are converted from a GGUF file, and unfinished files stand beside the new directory."""
    before = snapshot(gguf_run)
    asked = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(gguf_run) and asked(path, mode))
    convert(gguf_run, "vllm", tmp_path / "new" / "checkpoint", Ui(quiet=True))
    assert snapshot(gguf_run) == before and not (gguf_run / ".lock").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["checkpoint"]


def test_a_target_that_is_there_and_a_directory_that_is_no_run(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    asked = ("--to", "nemotron-nas", "--output", tmp_path / "mine")
    assert_refused(nbl("convert", runs["linear"], *asked), 1, "mine is there already")
    assert (tmp_path / "mine").read_text() == "mine"
    assert_refused(nbl("convert", tmp_path / "nowhere", *asked[:3], tmp_path / "new"), 1, "nowhere does not exist")


@pytest.mark.parametrize(
    ("model", "words", "status", "part"),
    [
        ("llama", ("tensorrt-llm",), 1, "is not possible: --to nemotron-nas rounds the width of an MLP"),
        ("nas", ("gguf",), 1, "--for llama.cpp is not possible: llama.cpp's converter takes the vocabularies"),
        ("nas", ("mlx-lm", "--layers", "0,1"), 1, "mask from layer 0, which is replaced; name other layers"),
        ("qwen2", ("mlx-lm",), 1, "nbl-export writes llama, mistral for it, and not qwen2; leave --for out"),
        ("granite", ("vllm",), 1, "and not granite; leave --for out"),
        ("llama", ("mlx-lm", "--exit-layer", "1"), 2, "it does not hold predicted KV; leave --exit-layer out"),
    ],
)  # fmt: skip
def test_a_destination_that_cannot_have_a_model_is_refused_before_work(
    model: str, words: tuple[str, ...], status: int, part: str, checkpoint: Any, tmp_path: Path
) -> None:
    place = save_checkpoint("llama", tmp_path / "model", **NAS) if model == "nas" else checkpoint(model)
    done = nbl("--model", place, "--for", *words, "--output", tmp_path / "run")
    assert_refused(done, status, part)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("select", ["efficient", "cca"])
def test_a_job_for_mlx_keeps_layer_0(select: str, text: Path, tmp_path: Path) -> None:
    model = save_checkpoint("llama", tmp_path / "model", **NAS)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.self_attn.o_proj.weight"][:] = 0  # so layer 0 would go first
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    chosen = keys(context=64, select=select)
    words = ("--model", model, "--calibration", text, *chosen, "--for", "mlx-lm", "--layers", "2")
    with until("plan"):
        done = nbl(*words, "--output", tmp_path / "run")
    assert done.status == 0, done.err
    manifest = json.loads((tmp_path / "run" / "nbl.json").read_text(encoding="utf-8"))
    assert manifest["replaced_layers"] == [1, 2]
    assert (manifest["options"]["maps"], manifest["options"]["tap"]) == ("linear", "normed")


def linear(*layers: int) -> dict[int, Linear]:
    return {i: Linear(random_map(i).weight, np.zeros(HIDDEN, np.float32)) for i in layers}


def test_what_transformers_cannot_load_is_not_written(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def renamed(*given: Any) -> bool:
        assert copy_linearized(*given)
        (given[-1] / "model.safetensors").rename(given[-1] / "model-00001-of-00001.safetensors")
        return True

    monkeypatch.setattr(copied, "copy_linearized", renamed)
    out = tmp_path / "out"
    assert_refused(nbl("convert", finished, "--to", "transformers", "--output", out), 1, "cannot be loaded by")
    assert not out.exists()


def test_no_form_names_code_of_a_stranger(finished: Path, tmp_path: Path) -> None:
    """Two forms name code that this tool wrote beside their settings."""
    checkpoint, maps = save_checkpoint("llama", tmp_path / "model", **NAS), linear(1, 2)
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    for folder in (checkpoint, run / "original", run / "model"):
        name_code(folder)
    made = {name: tmp_path / name for name in ("copied", "saved", "nas", "edge", "stock")}
    assert copy_linearized(checkpoint, maps, "normed", made["copied"])
    save_linearized(load_model(checkpoint), checkpoint, maps, "normed", made["saved"])
    nemotron_nas.save(load_model(checkpoint), checkpoint, maps, "nemotron-nas", made["nas"])
    edge_llm.save(load_model(checkpoint), checkpoint, maps, "normed", made["edge"])
    given = Path(shutil.copytree(made["copied"], tmp_path / "given"))
    name_code(given)
    materialise(resolve(str(given)), made["stock"])
    ours = {"nas": "configuration_nbl_nas.NblNasConfig", "edge": "configuration_nbl_edge_llm.NblEdgeConfig"}
    found = {name: named_code(folder) for name, folder in made.items()}
    assert found == {name: [("config.json", {"AutoConfig": ours[name]})] if name in ours else [] for name in made}


@pytest.mark.parametrize("form", nemotron_nas.MATRIX)
@pytest.mark.parametrize("architecture", ["llama", "llama3", "mistral"])
def test_a_nemotron_nas_directory_is_the_same_model(form: str, architecture: str, tmp_path: Path) -> None:
    checkpoint, maps = save_checkpoint(architecture, tmp_path / "model", **NAS), linear(1, 2)
    nemotron_nas.save(load_model(checkpoint), checkpoint, maps, form, tmp_path / "out")
    expected = linearize(load_model(checkpoint), maps, "normed")
    with torch.inference_mode():
        found = nemotron_nas.load(tmp_path / "out")(IDS, use_cache=False).logits
        assert torch.equal(found, expected(IDS, use_cache=False).logits)
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"  # which transformers 4 knows
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"] and config["model_type"] == "nemotron-nas"
    assert [b["attention"]["replace_with_linear"] for b in config["block_configs"]] == [False, True, True]
    assert [b["attention"]["n_heads_in_group"] for b in config["block_configs"]] == [3, None, None]
    assert int(2 * config["block_configs"][0]["ffn"]["ffn_mult"] * HIDDEN / 3) <= 256
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert f"model.layers.1.self_attn.{nemotron_nas.MATRIX[form]}.weight" in names
    assert not [n for n in names if "layers.1.self_attn.q_proj" in n or n.endswith("bias")]


def test_a_nemotron_nas_configuration_loads_by_its_own_code(tmp_path: Path) -> None:
    """As TensorRT-LLM reads it: with the code beside the weights, attributes of attributes."""
    from transformers import AutoConfig

    checkpoint = save_checkpoint("llama", tmp_path / "model", **NAS)
    nemotron_nas.save(load_model(checkpoint), checkpoint, linear(1), "nemotron-nas", tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert [b.attention.replace_with_linear for b in config.block_configs] == [False, True, False]
    assert config.block_configs[0].attention.n_heads_in_group == 3 and not config.block_configs[0].ffn.no_op
    assert json.loads(config.to_json_string())["block_configs"][1]["attention"]["replace_with_linear"] is True


def test_a_nemotron_nas_directory_without_a_matrix(tmp_path: Path) -> None:
    checkpoint = save_checkpoint("llama", tmp_path / "model", **NAS)
    nemotron_nas.save(load_model(checkpoint), checkpoint, linear(1), "mlx", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights.pop("model.layers.1.self_attn.linear.weight")
    save_file(weights, tmp_path / "out" / "model.safetensors")
    with pytest.raises(CorruptError, match=r"lacks model.layers.1.self_attn.linear.weight"):
        nemotron_nas.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("architecture", "changes", "layers", "part"),
    [("qwen2", {}, (1,), "and not qwen2"), ("mistral-window", {}, (1,), "sliding window"),
     ("llama", {}, (0,), "takes its mask from layer 0"), ("llama", {"attention_bias": True}, (1,), "biases"),
     ("llama", {"head_dim": 32}, (1,), "size of a head")],
)  # fmt: skip
def test_what_nemotron_nas_cannot_hold(
    architecture: str, changes: dict[str, object], layers: tuple[int, ...], part: str, tmp_path: Path
) -> None:
    checkpoint = save_checkpoint(architecture, tmp_path / "model", **{**NAS, **changes})
    with pytest.raises(NblError, match=part):
        nemotron_nas.save(load_model(checkpoint), checkpoint, linear(*layers), "mlx", tmp_path / "out")
    assert not (tmp_path / "out").exists()
