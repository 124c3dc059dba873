"""TensorRT-Edge-LLM's loaders and exporter on tiny models: its graph gives the logits of torch (`make test-edge-llm`).

The exporter runs on a CPU. Attention in its graph is a plugin of TensorRT, which `Attention` here computes in NumPy
over one page of its cache. Nothing else of the graph is ours.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from nbl_export.methods.base import Mixer
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.linear.maps import Linear
from nbl_export.targets.checkpoint import edge_llm

from ..tiny import HIDDEN, LAYERS, random_map, save_checkpoint

pytestmark = pytest.mark.edge_llm

PYTHON = os.environ.get("NBL_EDGE_LLM_PYTHON", "")
PAGE = 128  # tokens of a page, which its exporter writes into the shape of a cache
PROMPT, STEPS = 20, 3
NORMED: dict[int, Mixer] = {1: random_map(1)}


class Attention(OpRun):
    """AttentionPlugin for one sequence whose keys and values are in page 0."""

    op_domain = "trt_edgellm"

    def _run(self, qkv, cache, query_lengths, rope, past_lengths, *inputs, **given: Any):  # type: ignore[no-untyped-def]
        heads, kv_heads, size = (int(given[name]) for name in ("num_q_heads", "num_kv_heads", "head_size"))
        past, new = int(past_lengths[0]), int(query_lengths[0])
        assert new == len(qkv) and given["enable_kv_shared"] == 0 and given["sliding_window_size"] == -1
        rows = qkv.astype(np.float32).reshape(new, heads + 2 * kv_heads, size)
        query, key, value = np.split(rows, [heads, heads + kv_heads], axis=1)
        if given["enable_qk_norm"]:
            of_query, of_key = (array for array in inputs if array.dtype == np.float16 and array.shape == (size,))
            query = _normed(query, of_query, given["rms_norm_eps"])
            key = _normed(key, of_key, given["rms_norm_eps"])
        cos, sin = np.split(rope[:, None], 2, axis=2)
        present = cache.copy()
        present[0, 0, past : past + new] = _rotated(key, cos, sin)
        present[1, 0, past : past + new] = value
        keys, values = (present[i, 0, : past + new].astype(np.float32) for i in (0, 1))
        grouped = _rotated(query, cos, sin).reshape(new, kv_heads, heads // kv_heads, size)
        scores = np.einsum("tkgd,skd->tkgs", grouped, keys) * given["attention_scale"]
        hidden = np.arange(past + new)[None] > (past + np.arange(new))[:, None]
        scores[np.broadcast_to(hidden[:, None, None], scores.shape)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("tkgs,skd->tkgd", weights / weights.sum(-1, keepdims=True), values)
        return mixed.reshape(new, heads, size).astype(qkv.dtype), present


def _rotated(rows: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    first, second = np.split(rows, 2, axis=2)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=2)


def _normed(rows: np.ndarray, gamma: Any, epsilon: float) -> np.ndarray:
    return rows / np.sqrt((rows**2).mean(-1, keepdims=True) + epsilon) * np.asarray(gamma, np.float32)


Attention.__name__ = "AttentionPlugin"  # the evaluator finds an operator by the name of its class


class Exported:
    """A directory that the exporter wrote, run step by step."""

    def __init__(self, directory: Path, model: Any) -> None:
        from safetensors.numpy import load_file

        self.config = json.loads((directory / "config.json").read_text())
        self.embedding = load_file(directory / "embedding.safetensors")["embedding"]
        self.graph = onnx.load(directory / "model.onnx")
        self.caches = [
            np.zeros((2, 1, PAGE, c["num_kv_heads"], c["head_dim"]), np.float16)
            for c in self.config.get("kv_layer_configs", [])
        ]
        self._evaluator = ReferenceEvaluator(self.graph, new_ops=[Attention])
        self._rotary, self._seen = model.get_decoder().rotary_emb, 0

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits of all of some more tokens."""
        new, past = len(ids), self._seen
        positions = torch.arange(past, past + new)[None]
        cos, sin = (part[0, :, : part.shape[-1] // 2].numpy() for part in self._rotary(torch.zeros(1), positions))
        one = {"query_lengths": new, "past_lengths": past, "attention_sequence_lengths": past + new, "state_indices": 0}
        given: dict[str, Any] = {
            "inputs_embeds": self.embedding[ids],
            "rope_rotary_cos_sin": np.concatenate([cos, sin], 1).astype(np.float32),
            "positions": positions[0].numpy().astype(np.int32),
            "query_start_offsets": np.array([0, new], np.int32),
            "execution_phase_marker": np.zeros(1, np.int32),
            "context_sequence_count_carrier": np.zeros(0, np.int32),
            "kv_page_table": np.zeros((1, 2, 1), np.int32),
            "logits_indices": np.arange(new),
            **{name: np.array([value], np.int32) for name, value in one.items()},
            **{f"past_key_values_{i}": cache for i, cache in enumerate(self.caches)},
        }
        names = {value.name for value in self.graph.graph.input}
        found: Any = self._evaluator.run(None, {n: v for n, v in given.items() if n in names})
        self.caches, self._seen = found[1:], past + new
        return np.asarray(found[0])


def export(checkpoint: Path, out: Path) -> Path:
    """What `tensorrt-edgellm-export` writes of a checkpoint."""
    if not PYTHON:
        pytest.skip("NBL_EDGE_LLM_PYTHON names no Python with tensorrt-edgellm; see make test-edge-llm")
    words = [PYTHON, "-m", "tensorrt_edgellm.scripts.export", str(checkpoint), str(out)]
    home = {**os.environ, "HF_MODULES_CACHE": str(out.parent / "modules")}
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=home)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / "llm"


def saved(architecture: str, maps: dict[int, Mixer], tap: str, home: Path) -> Path:
    changes = {"mlp_bias": False} if architecture == "llama-bias" else {}  # biases of attention alone
    original = save_checkpoint(architecture, home / "original", **changes)
    edge_llm.save(load_model(original), original, maps, tap, home / "saved")
    (home / "saved" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return home / "saved"


@pytest.mark.parametrize(
    ("architecture", "maps", "tap"),
    [("llama", {1: random_map(1)}, "residual"), ("llama", {0: random_map(0), 1: Linear.zeros(HIDDEN)}, "normed"),
     ("mistral", {0: random_map(0), 2: random_map(2)}, "normed"), ("qwen2", {2: random_map(2)}, "normed"),
     ("qwen3", {1: random_map(1)}, "residual"), ("llama-bias", {1: random_map(1)}, "normed")],
)  # fmt: skip
def test_the_graph_of_edge_llm_gives_the_logits_of_torch(
    architecture: str, maps: dict[int, Mixer], tap: str, tmp_path: Path
) -> None:
    directory = saved(architecture, maps, tap, tmp_path)
    model = edge_llm.load(directory)
    exported = Exported(export(directory, tmp_path / "exported"), model)
    kept = LAYERS - len(maps)
    plugins = [node for node in exported.graph.graph.node if node.op_type == "AttentionPlugin"]
    assert len(plugins) == exported.config["num_attention_layers"] == len(exported.caches) == kept
    assert exported.config["layer_types"] == ["attention"] * kept
    ids = torch.randint(3, 380, (PROMPT + STEPS,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    found = [exported.logits(ids[:PROMPT]), *(exported.logits([token]) for token in ids[PROMPT:])]
    away = np.concatenate(found) - expected
    assert np.sqrt((away**2).mean()) < 0.01 * np.sqrt((expected**2).mean())


def test_a_checkpoint_without_a_map_is_refused_by_the_exporter(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    directory = saved("llama", {1: random_map(1)}, "normed", tmp_path)
    weights = load_file(directory / "model.safetensors")
    weights.pop("model.layers.1.self_attn.linear.weight")
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(AssertionError, match="the checkpoint has no map of layer 1"):
        export(directory, tmp_path / "exported")
