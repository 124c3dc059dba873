"""A whole job with an exit layer: chosen and named, stopped and continued, and what it refuses before work."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import nbl_export.hf  # noqa: F401  registers the classes
from nbl_export.methods.applied import linearize
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.maps_file import load_maps

from ..command import BARE, assert_refused, keys, nbl, snapshot
from ..jobs import until
from ..tiny import EVERY

pytestmark = pytest.mark.job

EXIT = ("--recent-tokens", "4", "--max-perplexity-increase", "10000%")


@pytest.fixture(scope="module")
def chosen(checkpoint: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job that chose its exit layer."""
    run = tmp_path_factory.mktemp("exit") / "run"
    done = nbl("--model", checkpoint("llama"), "--calibration", text, *BARE, *EXIT, "--output", run)
    assert done.status == 0, done.err
    return run


def test_the_default_job_chooses_an_exit_layer(chosen: Path) -> None:
    manifest = json.loads((chosen / "nbl.json").read_text(encoding="utf-8"))
    assert manifest["options"]["exit_layer"] == "auto" and manifest["fit"]["kind"] == "independent"
    assert manifest["exit"] == {"layer": 1, "recent_tokens": 4}
    assert (manifest["replaced_layers"], manifest["kinds"]) == ([1, 2], ["predicted_kv", "predicted_kv"])
    assert (chosen / "sums.safetensors").is_file()
    report = json.loads((chosen / "report.json").read_text(encoding="utf-8"))
    assert (
        report["status"] == "verified"
        and report["cache_bytes_per_token"]["nbl"] == report["cache_bytes_per_token"]["original"]
    )
    assert {row["prompt"] for row in report["quality_loss"]} != {0}
    page = (chosen / "report.md").read_text(encoding="utf-8")
    assert "ayers 1 to 2 run for the first token of a prompt and the last 4" in page and "NaN" not in page


@pytest.mark.parametrize("form", ["nemotron-nas", "mlx", "edge-llm"])
def test_forms_that_do_not_hold_predicted_keys_are_refused(form: str, chosen: Path, tmp_path: Path) -> None:
    done = nbl("convert", chosen, "--to", form, "--output", tmp_path / "out")
    assert_refused(done, 1, "has predicted KV, which --to", "--layers N")
    assert not (tmp_path / "out").exists()
    routes = {route["name"]: route["reason"] for route in json.loads(nbl("convert", chosen, "--json").out)}
    assert [name for name, reason in routes.items() if not reason] == ["genai", "transformers", "vllm"]
    assert routes["mlx-lm"] == "it does not hold predicted KV; make another run with --for mlx-lm"


@pytest.mark.parametrize("form", ["transformers", "vllm"])
def test_transformers_loads_what_a_run_with_an_exit_layer_is_converted_to(
    form: str, chosen: Path, checkpoint: Any, tmp_path: Path
) -> None:
    saved = tmp_path / "nbl"
    done = nbl("convert", chosen, "--to", form, "--output", saved)
    assert done.status == 0, done.err
    expected = linearize(load_model(checkpoint("llama")), load_maps(chosen / "maps.safetensors", (1, 2)))
    text = torch.arange(2, 40)[None]
    with torch.inference_mode():
        found, right = (
            model(text, use_cache=False).logits[:, -4:]
            for model in (AutoModelForCausalLM.from_pretrained(saved).eval(), expected)
        )
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    for words in (("estimate", saved), ("--model", saved, "--output", tmp_path / "run")):
        assert_refused(nbl(*words), 2, saved, "has predicted KV", "give that model")
    assert not (tmp_path / "run").exists()


def test_the_maps_of_a_run_make_its_graph_again(chosen: Path, tmp_path: Path) -> None:
    done = nbl("rewrite-graph", chosen / "original", "--maps", chosen, "--output", tmp_path / "out")
    assert done.status == 0, done.err
    made, before = snapshot(tmp_path / "out"), snapshot(chosen / "model")
    told = [
        json.loads((place / "nbl.json").read_text(encoding="utf-8")) for place in (tmp_path / "out", chosen / "model")
    ]
    assert told[0]["exit"] == told[1]["exit"]
    assert {name: made[name] for name in made if name != "nbl.json"} == {
        name: before[name] for name in made if name != "nbl.json"
    }


def test_sums_that_were_changed_are_refused(chosen: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(chosen, tmp_path / "run"))
    sums = run / "sums.safetensors"
    sums.write_bytes(sums.read_bytes()[:-1] + b"\1")
    before = snapshot(run)
    done = nbl("plan", run, "--exit-layer", "2", "--recent-tokens", "3")
    assert_refused(done, 1, "sums.safetensors is corrupted", "delete it to have it made again")
    assert snapshot(run) == before


def test_another_exit_layer_of_the_same_run_uses_its_sums(chosen: Path) -> None:
    before = (chosen / "sums.safetensors").read_bytes()
    done = nbl("plan", chosen, "--exit-layer", "2", "--recent-tokens", "3")
    assert done.status == 0, done.err
    assert done.out == ""  # an exit layer has no scores of single layers
    assert done.err.index("this undoes rewrite, verify, ") < done.err.index("plan: done")
    manifest = json.loads((chosen / "nbl.json").read_text(encoding="utf-8"))
    assert manifest["exit"] == {"layer": 2, "recent_tokens": 3} and (chosen / "sums.safetensors").read_bytes() == before


@pytest.mark.parametrize(("given", "status", "part"), [
    (("--exit-layer", "3"), 1, "--exit-layer 3: this model has layers 0 to 2; exit at 1 or above"),
    (("--exit-layer", "0"), 1, "--exit-layer 0: this model has layers 0 to 2; exit at 1 or above"),
    (("--exit-layer", "high"), 2, "--exit-layer 'high': write a layer (20), auto or none"),
    (("--exit-layer", "1", "--recent-tokens", "100000"), 1, "--recent-tokens 100000 is beyond the model's"),
    (("--exit-layer", "1", "--layers", "1"), 2, "--exit-layer does not go with --layers; give one of them"),
    (("--exit-layer", "1", "--fit", "distilled"), 2, "--exit-layer does not go with --fit distilled"),
    (("--exit-layer", "1", *keys(logits="all")), 2, "--exit-layer does not go with key logits all"),
    (("--exit-layer", "1", "--max-perplexity-increase", "5%"), 2, "--exit-layer 1 names the exit layer"),
    (("--exit-layer", "1", "--precision", "fp16"), 1, "--exit-layer is not possible for this model: graphs of"),
    (("--recent-tokens", "8", "--layers", "1"), 2, "--recent-tokens is for --exit-layer"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(
    given: tuple[str, ...], status: int, part: str, checkpoint: Any, tmp_path: Path
) -> None:
    done = nbl("--model", checkpoint("llama"), *given, "--output", tmp_path / "run")
    assert_refused(done, status, part)
    assert not (tmp_path / "run").exists()


# In `make test` those of mobius, with a window and norms of keys, and whose map of the exit layer is fitted.
TAKERS = [
    pytest.param(name, marks=() if name in ("gemma3", "olmo2") else pytest.mark.fuzz)
    for name in EVERY
    if name not in ("hunyuan", "exaone4")
]


@pytest.mark.parametrize("architecture", TAKERS)
def test_an_architecture_takes_an_exit_layer(architecture: str, checkpoint: Any, text: Path, tmp_path: Path) -> None:
    """From the checkpoint to a verified decoder in int8, maps fitted on text."""
    exits = ("--exit-layer", "2" if architecture == "gpt_oss" else "1", "--recent-tokens", "5")
    given = ("--model", checkpoint(architecture), "--calibration", text, *BARE, *exits)
    with until("verify"):
        done = nbl(*given, "--output", tmp_path / "run")
    assert done.status == 0, done.err
    verify = json.loads((tmp_path / "run" / "verify.json").read_text())
    assert verify["passed"] and {"nbl", "text", "last_token", "shipped"} <= {r["check"] for r in verify["checks"]}


@pytest.mark.parametrize(("architecture", "precision"), [("qwen3", "fp16"), ("gemma3", "int8")])
def test_cuda_directories_take_an_exit_layer(
    architecture: str, precision: str, checkpoint: Any, text: Path, tmp_path: Path
) -> None:
    """Norms of queries and keys in fp16, and a stream wider than its attention. The CPU provider computes both."""
    given = ("--model", checkpoint(architecture), "--calibration", text, *BARE, "--provider", "cuda")
    with until("verify"):
        done = nbl(*given, "--precision", precision, "--exit-layer", "1", "--recent-tokens", "5", "--output", tmp_path)
    assert done.status == 0, done.err
    verify = json.loads((tmp_path / "verify.json").read_text())
    assert verify["passed"] and {"nbl", "text", "last_token"} <= {r["check"] for r in verify["checks"]}


def test_other_attention_is_refused_or_gets_linear_layers(checkpoint: Any, tmp_path: Path) -> None:
    done = nbl("--model", checkpoint("hunyuan"), "--exit-layer", "1", "--output", tmp_path / "run")
    assert_refused(done, 1, "--exit-layer is not possible")
    with until("calibrate"):
        done = nbl("--model", checkpoint("hunyuan"), *BARE, "--output", tmp_path / "run")
    options = json.loads((tmp_path / "run" / "nbl.json").read_text(encoding="utf-8"))["options"]
    assert options["exit_layer"] == "none", done.err


def test_logits_that_are_not_finite_are_told(checkpoint: Any, text: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][:] = math.inf
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    options = (*BARE[:2], "--calibration-tokens", "2560", "--max-perplexity-increase", "5%", "--recent-tokens", "4")
    done = nbl("--model", model, "--calibration", text, *options, "--output", tmp_path / "run")
    assert_refused(done, 1, "the original's logits hold NaN or infinity")
