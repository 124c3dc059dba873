"""Attention left out: what that computes, and that it goes through the whole job as fitted maps do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export.methods.applied import linearize
from nbl_export.methods.linear.maps import Linear
from tests.command import configured, nbl
from tests.tiny import HIDDEN, LAYERS, VOCAB

pytestmark = pytest.mark.job

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


def test_drop_leaves_the_residual_alone() -> None:
    seen: dict[str, torch.Tensor] = {}
    layer = linearize(model := biased_model(), {1: Linear.zeros(HIDDEN)}).model.layers[1]
    layer.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0]))
    layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: seen.update(r=args[0]))
    with torch.no_grad():
        model(IDS[None], use_cache=False)
    assert torch.equal(seen["x"], seen["r"])


@pytest.mark.parametrize("tap", ["residual", "normed"])
def test_dropped_attention_ships_verified(tap: str, same: tuple[object, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = nbl(*same, "--layers", "1,2", "--fit", "drop", *configured(tap=tap), "--output", run)
    assert done.status == 0, done.err
    facts = json.loads((run / "nbl.json").read_text())
    assert (facts["status"], facts["fit"], facts["tap"]) == ("verified", {"kind": "drop"}, tap)
    assert all(0 < s["nmse"] < 1 and s["bound"] > 0 for s in facts["scores"])  # scored, though not by the map used
    assert json.loads((run / "model" / "nbl.json").read_text())["fit"] == {"kind": "drop"}
    said = (run / "report.md").read_text()
    assert "left out" in said and "it was fitted" not in said
