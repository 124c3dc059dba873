"""model/ on plain ONNX Runtime against transformers with maps.safetensors put in by hand, position by position.

    python bench/parity.py RUN_DIRECTORY > bench/results/parity-<model>.json

Uses neither the tool's linearization nor its runner, so that it checks them too. Beside each difference stands how far
torch in float32 is from torch in float64 at the same position: what float32 is worth there.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a fisherman who lived with his wife in a small hut close to the sea.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "In 1969, the first humans landed on the Moon. The mission was called",
    "Water boils at 100 degrees Celsius at sea level because",
    "<|im_start|>user\nWrite a haiku about autumn.<|im_end|>\n<|im_start|>assistant\n",
    "The history of the town begins in the twelfth century, when monks built a small priory near the river.",
    "List three reasons to learn a second language:\n1.",
)


class ByHand(torch.nn.Module):
    """Stands in for a self-attention whose layer norm has become the identity."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        return hidden_states @ self.weight.T + self.bias, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    facts = json.loads((run / "nbl.json").read_text())
    maps = load_file(run / "maps.safetensors")
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "checkpoint")
    for i in facts["replaced_layers"]:
        layer = model.model.layers[i]
        layer.input_layernorm = torch.nn.Identity()
        layer.self_attn = ByHand(maps[f"layers.{i}.weight"], maps[f"layers.{i}.bias"])
    exact = copy.deepcopy(model).double()
    session = onnxruntime.InferenceSession(run / "model" / "model.onnx", providers=["CPUExecutionProvider"])
    caches = [a.name for a in session.get_inputs() if a.name.startswith("past_key_values")]
    heads, size = facts["decoder"]["num_kv_heads"], facts["decoder"]["head_dim"]
    rows = []
    for prompt in PROMPTS:
        ids = np.array([tokenizer(prompt).input_ids])
        empty = {name: np.zeros((1, heads, 0, size), np.float32) for name in caches}
        (got,) = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty})
        with torch.inference_mode():
            expected = model(torch.from_numpy(ids), use_cache=False).logits[0].numpy()
            wide = exact(torch.from_numpy(ids), use_cache=False).logits[0].numpy()
        seen, own = np.abs(got[0] - expected).max(1), np.abs(expected - wide).max(1)
        at = int(seen.argmax())
        row = {"prompt": prompt, "tokens": ids.shape[1], "max_logit_difference": float(seen.max())}
        row |= {"at_position": at, "torch_float32_error_there": float(own[at]), "last_position": float(seen[-1])}
        rows.append({**row, "positions_over_1e-3": int((seen > 1e-3).sum())})
    total = sum(r["tokens"] for r in rows)
    over = sum(r["positions_over_1e-3"] for r in rows)
    summary = {"replaced_layers": facts["replaced_layers"], "positions": total, "positions_over_1e-3": over}
    print(json.dumps({**summary, "worst": max(r["max_logit_difference"] for r in rows), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
