"""The baselines: what they compute, and that they go through the whole job as fitted maps do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export.checkpoint import read_spec, resolve
from nbl_export.linearize import linearize
from nbl_export.methods import drop_map, own_token_map

from .command import assert_refused, nbl
from .tiny import HIDDEN, LAYERS, VOCAB, save_checkpoint

IDS = torch.arange(2, 42)


def biased_model() -> Any:
    """A tiny Llama with grouped heads and biases everywhere that are not zero."""
    import transformers

    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCAB, attention_bias=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_own_token_map_is_attention_over_sequences_of_one_token(tmp_path: Path) -> None:
    model = biased_model()
    spec = read_spec(resolve(str(save_checkpoint("llama", tmp_path))))
    with torch.no_grad():
        expected = model(IDS[:, None], use_cache=False).logits[:, 0]  # 40 sequences of one token each
        assert not torch.allclose(expected, model(IDS[None], use_cache=False).logits[0], atol=1e-2)
        maps = {i: own_token_map(layer.self_attn, spec) for i, layer in enumerate(model.model.layers)}
        found = linearize(model, maps, "normed")(IDS[None], use_cache=False).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_drop_leaves_the_residual_alone() -> None:
    seen: dict[str, torch.Tensor] = {}
    layer = linearize(model := biased_model(), {1: drop_map(HIDDEN)}).model.layers[1]
    layer.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0]))
    layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: seen.update(r=args[0]))
    with torch.no_grad():
        model(IDS[None], use_cache=False)
    assert torch.equal(seen["x"], seen["r"])


@pytest.mark.parametrize(("method", "tap"), [("drop", "residual"), ("wo-wv", "normed")])
def test_baselines_ship_verified(method: str, tap: str, same: tuple[object, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = nbl(*same, "--layers", "1,2", "--method", method, "--tap", tap, "--output", run)
    assert done.status == 0, done.err
    facts = json.loads((run / "nbl.json").read_text())
    assert (facts["status"], facts["method"], facts["tap"]) == ("verified", method, tap)
    assert all(0 < s["nmse"] < 1 and s["bound"] > 0 for s in facts["scores"])  # scored, though not by the map used
    assert json.loads((run / "model" / "nbl.json").read_text())["method"] == method
    said = (run / "report.md").read_text()
    assert {"drop": "left out", "wo-wv": "own value"}[method] in said and "it was fitted" not in said


def test_changed_method_changes_the_maps_and_keeps_the_moments(run: Path) -> None:
    before = (run / "maps.safetensors").read_bytes()
    done = nbl("plan", run, "--method", "drop")
    assert done.status == 0, done.err
    assert "calibrate: reused" in done.err and "plan: done" in done.err
    assert (run / "maps.safetensors").read_bytes() != before
    assert nbl("plan", run, "--method", "nbl").status == 0
    assert (run / "maps.safetensors").read_bytes() == before


def test_contradictions_are_refused(same: tuple[object, ...], tmp_path: Path) -> None:
    run = ("--output", tmp_path / "run")
    assert_refused(nbl(*same, "--method", "wo-wv", *run), 2, "--method wo-wv", "add --tap normed")
    assert_refused(nbl(*same, "--method", "drop", "--fit", "distilled", *run), 2, "--fit distilled", "--method drop")
    assert_refused(nbl(*same, "--method", "hope", *run), 1, "--method is nbl, drop, wo-wv, not 'hope'")
    assert not (tmp_path / "run" / "nbl.json").exists()
