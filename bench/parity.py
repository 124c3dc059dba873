"""Compares both graphs of a run on plain ONNX Runtime with transformers, at each position, in float32 and float64.

    python bench/parity.py RUN_DIRECTORY [--data DATA --windows 8] > bench/results/parity-<model>.json

`original/` is compared with the checkpoint, and `model/` with the checkpoint and the maps of maps.safetensors. The
script uses neither the linearization nor the runner of nbl-export, so it checks both.

Two float32 computations agree at best within their float32 errors. So each position has three distances (largest logit
difference): graph to torch, graph to torch in float64, and torch to torch in float64. The last distance is the float32
error of torch. Inputs are a few prompts, and windows of 256 tokens of the three texts of DATA (see bed.py).
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from bed import news
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW = 256
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
    """An affine map in place of a self-attention; the layer norm before it is the identity."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        return hidden_states @ self.weight.T + self.bias, None


class Graph:
    """Computes a graph's logits of all positions, with an empty cache."""

    def __init__(self, directory: Path, heads: int, size: int) -> None:
        every = directory / "all_logits.onnx"  # if model.onnx gives only the logits of the last token
        file = every if every.is_file() else directory / "model.onnx"
        self.session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        caches = [a.name for a in self.session.get_inputs() if a.name.startswith("past_key_values")]
        self.empty = {name: np.zeros((1, heads, 0, size), np.float32) for name in caches}

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        (got,) = self.session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **self.empty})
        if got.shape[1] != ids.shape[1]:
            raise SystemExit("the graph gives only the logits of the last token: export with --logits all")
        return np.asarray(got[0])


def linearized(model: Any, facts: dict[str, Any], maps: dict[str, torch.Tensor]) -> Any:
    if facts["tap"] != "residual":
        raise SystemExit("this script supports only maps of the residual tap")
    model = copy.deepcopy(model)
    for i in facts["replaced_layers"]:
        layer = model.model.layers[i]
        layer.input_layernorm = torch.nn.Identity()
        layer.self_attn = ByHand(maps[f"layers.{i}.weight"], maps[f"layers.{i}.bias"])
    return model


def texts(tokenizer: Any, data: Path, windows: int) -> Iterator[tuple[str, np.ndarray]]:
    """Windows [1, 256] of each text, spread evenly over the text."""
    read = {
        "c4": [d["text"] for d in json.loads((data / "c4/c4_demo.json").read_text(encoding="utf-8"))],
        "wikitext": [(data / "wikitext-2-raw/wiki.valid.raw").read_text(encoding="utf-8")],
        "news": news(data),
    }
    for name, documents in read.items():
        ids = np.array([i for d in documents for i in tokenizer(d, verbose=False).input_ids])
        rows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, 1, WINDOW)
        yield from ((name, row) for row in rows[np.linspace(0, len(rows) - 1, windows).astype(int)])


def distances(graph: Graph, model: Any, exact: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The three distances, [T] each."""
    with torch.inference_mode():
        narrow, wide = (m(torch.from_numpy(ids), use_cache=False).logits[0].numpy() for m in (model, exact))
    got = graph(ids)
    return {
        "graph to torch": np.abs(got - narrow).max(1),
        "graph to float64": np.abs(got - wide).max(1),
        "torch to float64": np.abs(narrow - wide).max(1),
    }


def spread(found: list[dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """Statistics of each distance over all positions."""
    joined = {name: np.concatenate([f[name] for f in found]) for name in found[0]}
    return {
        name: {
            "rms": float(np.sqrt(np.square(d, dtype=np.float64).mean())),
            **{f"p{q}": float(np.percentile(d, q)) for q in (50, 99)},
            "max": float(d.max()),
            "positions_over_1e-3": int((d > 1e-3).sum()),
        }
        for name, d in joined.items()
    }


def subject(graph: Graph, model: Any, rows: list[tuple[str, np.ndarray]]) -> dict[str, Any]:
    exact = copy.deepcopy(model).double()
    found = [distances(graph, model, exact, ids) for _, ids in rows]
    prompts = []
    for (prompt, ids), d in list(zip(rows, found, strict=True))[: len(PROMPTS)]:
        at = int(d["graph to torch"].argmax())
        row = {"prompt": prompt, "tokens": ids.shape[1], "at_position": at}
        prompts.append(row | {name: float(values[at]) for name, values in d.items()})
    return {"positions": sum(ids.shape[1] for _, ids in rows), "distances": spread(found), "prompts": prompts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--windows", type=int, default=8, help="windows of 256 tokens from each text of --data")
    options = parser.parse_args()
    run = options.run
    facts = json.loads((run / "nbl.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "checkpoint")
    rows = [(prompt, np.array([tokenizer(prompt).input_ids])) for prompt in PROMPTS]
    if options.data:
        rows += texts(tokenizer, options.data, options.windows)
    cache = facts["decoder"]["num_kv_heads"], facts["decoder"]["head_dim"]
    found = {"original": subject(Graph(run / "original", *cache), model, rows)}
    changed = linearized(model, facts, load_file(run / "maps.safetensors"))
    found["nbl"] = subject(Graph(run / "model", *cache), changed, rows)
    print(json.dumps({"replaced_layers": facts["replaced_layers"], "window": WINDOW, **found}, indent=1))


if __name__ == "__main__":
    main()
