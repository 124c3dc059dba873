"""A checkpoint with its layers replaced already, as the model of a job: saved, exported again, and the same graph."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nbl_export.errors import CorruptError
from nbl_export.methods.applied import linearize
from nbl_export.methods.checkpoint import load
from nbl_export.methods.checkpoint import source as checkpoint_source
from nbl_export.methods.checkpoint.hf_classes import restored, save_linearized
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.maps_file import load_maps
from tests.command import BARE, assert_refused, nbl, repeated
from tests.tiny import EVERY, HIDDEN, cases, record_of

pytestmark = pytest.mark.job

IDS = torch.arange(2, 40)[None]
LAYERS = (0, 2)


@pytest.fixture(scope="module")
def saved(same: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The NBL checkpoint of a run in float32: int8 is balanced by activations of the original. Never write to it."""
    run = tmp_path_factory.mktemp("source") / "run"
    assert nbl(*same, "--precision", "fp32", "--output", run).status == 0
    assert nbl("convert", run, "--to", "transformers", "--output", run.with_name("nbl-checkpoint")).status == 0
    return run.with_name("nbl-checkpoint")


@pytest.fixture(scope="module")
def again(saved: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on it. Never write to it."""
    output = tmp_path_factory.mktemp("again") / "run"
    done = nbl("--model", saved, "--calibration", text, *BARE, "--precision", "fp32", "--output", output)
    assert done.status == 0, done.err
    assert "calibrate: left out, the checkpoint no longer contains" in done.err
    return output


def _linearized(directory: Path, tap: str, make: Callable[..., dict[int, Linear]], out: Path) -> Path:
    save_linearized(load.load_model(directory), directory, make(*LAYERS), tap, out)
    return out


@pytest.mark.parametrize(
    ("architecture", "tap"),
    cases((name, tap) for name in EVERY for tap in record_of(name).taps),
)  # fmt: skip
def test_the_stock_model_with_the_maps_is_what_was_saved(
    architecture: str, tap: str, checkpoint: Callable[[str], Path],
    random_maps: Callable[..., dict[int, Linear]], tmp_path: Path,
) -> None:  # fmt: skip
    directory = _linearized(checkpoint(architecture), tap, random_maps, tmp_path / "nbl")
    source = checkpoint_source.resolve(str(directory))
    spec = load.read_spec(source)
    assert spec == load.read_spec(checkpoint_source.resolve(str(checkpoint(architecture))))
    plan, maps = load.load_maps(source, spec.num_layers)
    assert (plan.layers, plan.tap, plan.select) == (LAYERS, tap, "given")
    for i, m in random_maps(*LAYERS).items():
        for name, array in m.tensors().items():
            np.testing.assert_array_equal(maps[i].tensors()[name], array)
    stock = load.materialise(source, tmp_path / "stock")
    kinds = [json.loads((d / "config.json").read_text()) for d in (stock, checkpoint(architecture))]
    assert kinds[0]["architectures"] == kinds[1]["architectures"]
    model, original = (load.load_model(d) for d in (stock, checkpoint(architecture)))
    names = (original.state_dict(), model.state_dict())
    assert {n: t.shape for n, t in names[0].items()} == {n: t.shape for n, t in names[1].items()}
    with torch.inference_mode():
        told = [linearize(m, maps, tap)(IDS, use_cache=False).logits for m in (model, original)]
    assert torch.equal(*told)
    assert load.load_tokenizer(stock).encode("import") == load.load_tokenizer(directory).encode("import")


def test_a_checkpoint_keeps_dropped_attention(
    checkpoint: Callable[[str], Path], random_maps: Callable[..., dict[int, Linear]], tmp_path: Path
) -> None:
    import transformers

    maps = {**random_maps(0), 2: Linear.zeros(HIDDEN)}
    original, directory = load.load_model(checkpoint("llama")), tmp_path / "nbl"
    with torch.inference_mode():
        expected = linearize(load.load_model(checkpoint("llama")), maps)(IDS, use_cache=False).logits
    save_linearized(original, checkpoint("llama"), maps, "residual", directory)
    plan, found = load.load_maps(checkpoint_source.resolve(str(directory)), 3)
    assert plan.mixers == ("linear", "linear") and not found[2].stored()[0] and found[0].stored()[0]
    with torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_pretrained(directory)
        torch.testing.assert_close(model(IDS, use_cache=False).logits, expected)
    stock, names = restored(model).state_dict(), load.load_model(checkpoint("llama")).state_dict()
    assert {n: v.shape for n, v in stock.items()} == {n: v.shape for n, v in names.items()}


def test_the_job_makes_the_graph_that_the_checkpoint_came_from(saved: Path, again: Path) -> None:
    first = saved.with_name("run")
    for name in ("model.onnx", "model.onnx.data"):
        digests = [hashlib.sha256((run / "model" / name).read_bytes()).hexdigest() for run in (first, again)]
        assert digests[0] == digests[1], name
    manifests = [json.loads((run / "nbl.json").read_text()) for run in (first, again)]
    assert manifests[0]["replaced_layers"] == manifests[1]["replaced_layers"] != []
    assert (manifests[1]["fit"], manifests[1]["select"], manifests[1]["status"]) == (
        {"kind": "given"}, "given", "verified",
    )  # fmt: skip
    layers = manifests[0]["replaced_layers"]
    maps = [load_maps(run / "maps.safetensors", layers) for run in (first, again)]
    for layer in layers:
        one, other = (found[layer].tensors()["weight"] for found in maps)
        assert np.array_equal(one, other)


def test_what_cannot_be_known_is_not_told(again: Path) -> None:
    assert json.loads((again / "verify.json").read_text())["quality_loss"] == []
    assert "bench.json" in {p.name for p in again.iterdir()}
    page = (again / "report.html").read_text()
    assert "came with its maps" in page and "(from the checkpoint)" in page and "fitted on" not in page


def test_other_commands_know_such_a_run(again: Path, saved: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(again, tmp_path / "run"))
    for command in (("card", run), ("inspect", run), ("report", run), ("generate", run, "import")):
        done = nbl(*command)
        assert done.status == 0, done.err
    card = (run / "model" / "README.md").read_text()
    assert "the maps came with the checkpoint" in card and "quality loss was not measured" in card
    assert "fitted in" not in card


def test_a_run_on_it_saves_the_same_checkpoint_and_is_reused(
    again: Path, saved: Path, text: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    run = Path(shutil.copytree(again, tmp_path / "run"))
    recorded = repeated(json.loads((run / "nbl.json").read_text())["command"])[:-1]  # it says --fit given
    for arguments in (("--model", saved, "--calibration", text, *BARE, "--precision", "fp32", "--output"), recorded):
        done = nbl(*arguments, run)
        assert done.status == 0 and "verify: reused" in done.err, done.err
    assert nbl("convert", run, "--to", "transformers", "--output", run.with_name("nbl-checkpoint")).status == 0
    tensors = [load_file(d / "model.safetensors") for d in (saved, run.with_name("nbl-checkpoint"))]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(np.array_equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_what_needs_the_attention_is_refused(saved: Path, text: Path, tmp_path: Path) -> None:
    done = nbl("--model", saved, "--calibration", text, *BARE, "--layers", "1", "--output", tmp_path / "run")
    assert_refused(done, 2, "--layers", "leave")
    assert not (tmp_path / "run").exists()


def test_commands_that_need_the_attention_are_refused(saved: Path, again: Path, text: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(again, tmp_path / "run"))
    assert_refused(nbl("plan", run, "--layers", "1"), 2, "--layers", "no longer contains")
    done = nbl("calibrate", "--model", saved, "--calibration", text, "--output", tmp_path / "new")
    assert_refused(done, 1, "nothing to calibrate here", "no longer contains")
    assert not (tmp_path / "new").exists()
    assert {p.name for p in run.iterdir()} == {p.name for p in again.iterdir()}


def test_its_graph_can_be_evaluated(again: Path, text: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(again, tmp_path / "run"))
    done = nbl("eval", run, "--perplexity", f"here={text}", "--ppl-context", "64", "--limit", "2")
    assert done.status == 0, done.err
    assert [e["variant"] for e in json.loads((run / "eval.json").read_text())["results"]] == ["nbl"]


@pytest.mark.parametrize(
    ("change", "said"),
    [({"nbl_replaced_layers": [7]}, "replaces layers [7]"), ({"nbl_kinds": ["a"]}, "of the kinds ['a']"),
     ({"nbl_kinds": "linear"}, "of the kinds linear"),
     ({"nbl_kinds": [["linear"]] * 2}, "of the kinds [['linear'], ['linear']]"),
     ({"hidden_size": "many"}, "hidden_size"), ({"nbl_replaced_layers": None}, "replaces layers None"),
     ({"nbl_replaced_layers": ["x"]}, "replaces layers ['x']"), ({"nbl_tap": "elsewhere"}, "elsewhere"),
     ({"num_hidden_layers": "many"}, "of many"), ({"model_type": "nbl-bert"}, "'bert', which is not supported")],
)  # fmt: skip
def test_a_configuration_that_cannot_be(saved: Path, change: dict[str, object], said: str, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved, tmp_path / "nbl"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **change}))
    assert_refused(nbl("--model", directory, "--output", tmp_path / "run"), 1, directory, said)


def test_maps_that_are_not_those_of_the_configuration(
    checkpoint: Callable[[str], Path], random_maps: Callable[..., dict[int, Linear]], tmp_path: Path
) -> None:
    directory = _linearized(checkpoint("llama"), "residual", random_maps, tmp_path / "nbl")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "nbl_replaced_layers": [0]}))
    with pytest.raises(CorruptError, match=r"names maps of layers \[0\], the weights hold maps of \[0, 2\]"):
        load.load_maps(checkpoint_source.resolve(str(directory)), 3)
