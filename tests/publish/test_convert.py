"""`convert`: a run's model in the forms of other engines, and what these forms cannot hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from nbl_export.calibrate.moments_file import whole_moments
from nbl_export.errors import CorruptError, NblError
from nbl_export.graph.gguf.content import read_content
from nbl_export.mixers import lmmse
from nbl_export.mixers.linear import LINEAR, Linear
from nbl_export.model.checkpoint.load import load_model
from nbl_export.model.linearize import linearize
from nbl_export.plan.maps_file import load_maps
from nbl_export.targets.checkpoint import nemotron_nas

from ..canaries import Canaries
from ..command import TINY, assert_refused, nbl
from ..jobs import until
from ..tiny import HIDDEN, SPLIT, random_map, save_checkpoint, save_gguf

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs on a GGUF: maps without a bias, with a bias on the normed input, and on the residual stream."""
    model = save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    kinds = {"linear": ("--maps", "linear"), "normed": ("--tap", "normed"), "residual": ()}
    found = {}
    for name, options in kinds.items():
        found[name] = tmp_path_factory.mktemp("runs") / name
        words = ("--model", model, "--calibration", text, *TINY, "--layers", "1,2", *options)
        with until("verify"):
            done = nbl(*words, "--output", found[name])
        assert done.status == 0, done.err
    return found


def maps_in(path: Path) -> dict[int, np.ndarray]:
    content = read_content(path)
    return {
        i: content.by_name[f"blk.{i}.attn_output.weight"].values() for i in content.keys["nbl.replaced_layers"].value
    }


def test_gguf_of_linear_maps_holds_them_as_they_are(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canaries = Canaries(tmp_path / "canaries")
    (tmp_path / "strange").mkdir()
    canaries.plant(tmp_path / "strange")
    monkeypatch.chdir(tmp_path / "strange")  # a node package of the working directory is not run
    done = nbl("convert", runs["linear"], "--to", "gguf", "--output", tmp_path / "m.gguf")
    assert canaries.touched() == []
    assert (done.status, done.out) == (0, f"{tmp_path / 'm.gguf'}\n"), done.err
    for said in ("not run in llama.cpp", "NBL_NODE_LLAMA_CPP", "kept tensors byte for byte"):
        assert said in done.err
    assert "Perplexity" not in done.err  # nothing changed
    maps = load_maps(runs["linear"] / "maps.safetensors", (1, 2))
    for i, found in maps_in(tmp_path / "m.gguf").items():
        np.testing.assert_array_equal(found, maps[i].tensors()["weight"])
    assert not [p.name for p in runs["linear"].iterdir() if p.name.startswith(".tmp-")]


@pytest.mark.parametrize("kind", ["normed", "residual"])
def test_other_maps_are_made_linear_and_what_that_costs_is_said(
    kind: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    """Both ways give the least-squares map without an intercept, which the run with --maps linear has fitted."""
    done = nbl("convert", runs[kind], "--to", "gguf", "--output", tmp_path / "m.gguf")
    assert done.status == 0, done.err
    assert "Perplexity on held-back text: original" in done.err
    assert ("folded into its matrix" in done.err) == (kind == "normed")
    assert ("collecting them from 1024 tokens" in done.err) == (kind == "residual")
    expected = load_maps(runs["linear"] / "maps.safetensors", (1, 2))
    for i, found in maps_in(tmp_path / "m.gguf").items():
        apart = np.abs(found - expected[i].tensors()["weight"]).max() / np.abs(expected[i].tensors()["weight"]).max()
        assert apart < 1e-3, (i, apart)


def test_a_folded_bias_is_the_nearest_map(runs: dict[str, Path]) -> None:
    """For any map, here a random one: the gradient of the distance over the calibration rows is zero."""
    with whole_moments(runs["normed"] / "moments.safetensors") as file:
        moments = file.sums(1, "normed").moments()
    given = random_map(1)
    folded = lmmse.fold_bias(given.weight, given.bias, moments, 1, ridge=0.0)
    change = torch.from_numpy(folded - given.weight).double()
    bias = torch.from_numpy(given.bias).double()
    gradient = change @ moments.xx - torch.outer(bias, moments.x_sum)
    assert float(gradient.abs().max()) < 1e-3 * float(torch.outer(bias, moments.x_sum).abs().max())
    assert not LINEAR.from_tensors({"weight": folded, "bias": given.bias}).as_product(moments, 1).bias.any()


def test_gguf_types_and_base(runs: dict[str, Path], tmp_path: Path) -> None:
    model = Path(json.loads((runs["linear"] / "nbl.json").read_text())["places"]["model"])
    for options in (("--type", "q8_0"), ("--base", model)):
        target = tmp_path / f"{options[1]}.gguf".replace("/", "_")
        done = nbl("convert", runs["linear"], "--to", "gguf", *options, "--output", target)
        assert done.status == 0, done.err
    kinds = {t.kind.name for t in read_content(tmp_path / "q8_0.gguf").tensors if len(t.shape) == 2}
    assert kinds == {"Q8_0"}
    assert nbl("inspect", tmp_path / "q8_0.gguf").status != 0  # no traceback
    other = save_checkpoint("llama", tmp_path / "other")
    assert_refused(nbl("convert", runs["linear"], "--to", "gguf", "--base", other / "config.json", "--output",
                       tmp_path / "x.gguf"), 1, "cannot be read as GGUF")  # fmt: skip


@pytest.mark.parametrize(
    ("options", "status", "part"),
    [
        (("--to", "onnx"), 2, "--to is transformers, gguf, nemotron-nas, mlx, edge-llm"),
        (("--to", "gguf", "--type", "q3_k"), 2, "--type is keep, f16, q8_0, q4_0"),
        (("--to", "mlx", "--type", "f16"), 2, "--type is for --to gguf"),
        (("--to", "gguf", "--base", "nowhere.gguf"), 1, "nowhere.gguf is not a file"),
        (("--to", "nemotron-nas"), 1, "rounds the width of an MLP to a multiple of 256, and this model's is 128"),
    ],
)
def test_refused(options: tuple[str, ...], status: int, part: str, runs: dict[str, Path], tmp_path: Path) -> None:
    assert_refused(nbl("convert", runs["linear"], *options, "--output", tmp_path / "out"), status, part)
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_there_and_a_directory_that_is_no_run(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").write_text("mine")
    asked = ("--to", "gguf", "--output", tmp_path / "mine.gguf")
    assert_refused(nbl("convert", runs["linear"], *asked), 1, "mine.gguf is there already")
    assert (tmp_path / "mine.gguf").read_text() == "mine"
    assert nbl("convert", tmp_path / "nowhere", *asked[:3], tmp_path / "new.gguf").status == 1


def test_without_the_text_the_command_of_a_run_that_can_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["residual"], tmp_path / "run"))
    manifest = json.loads((run / "nbl.json").read_text())
    manifest["calibration"]["sha256"] = "0" * 64
    (run / "nbl.json").write_text(json.dumps(manifest))
    done = nbl("convert", run, "--to", "gguf", "--output", tmp_path / "m.gguf")
    assert_refused(done, 1, "has changed since this run", "--maps linear", "--layers 1,2")


NAS = {"intermediate_size": 256, **SPLIT}  # what the Nemotron-NAS form holds


def linear(*layers: int) -> dict[int, Linear]:
    return {i: Linear(random_map(i).weight, np.zeros(HIDDEN, np.float32)) for i in layers}


@pytest.mark.parametrize("form", nemotron_nas.MATRIX)
@pytest.mark.parametrize("architecture", ["llama", "llama3", "mistral"])
def test_a_nemotron_nas_directory_is_the_same_model(form: str, architecture: str, tmp_path: Path) -> None:
    checkpoint, maps = save_checkpoint(architecture, tmp_path / "model", **NAS), linear(1, 2)
    nemotron_nas.save(load_model(checkpoint), checkpoint, maps, form, tmp_path / "out")
    expected = linearize(load_model(checkpoint), maps, "normed")
    with torch.inference_mode():
        found = nemotron_nas.load(tmp_path / "out")(IDS, use_cache=False).logits
        assert torch.equal(found, expected(IDS, use_cache=False).logits)
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
    with pytest.raises(CorruptError, match="no matrix of layer 1"):
        nemotron_nas.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("architecture", "changes", "layers", "part"),
    [("qwen2", {}, (1,), "qwen2 is another architecture"), ("mistral-window", {}, (1,), "sliding window"),
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


def test_gguf_of_a_checkpoint(run: Path) -> None:
    """A run on safetensors: the file has the checkpoint's tokenizer, and maps in the type of the checkpoint."""
    done = nbl("convert", run, "--to", "gguf", "--output", run.with_name("m.gguf"))
    assert done.status == 0, done.err
    content = read_content(run.with_name("m.gguf"))
    assert content.keys["tokenizer.ggml.pre"].value == "gpt-2"
    assert {t.kind.name for t in content.tensors} == {"F32"}
