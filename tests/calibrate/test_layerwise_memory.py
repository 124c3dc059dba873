"""Calibration one layer at a time holds a random Llama's layer, not the Llama."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

LAYERS, HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, VOCABULARY = 12, 2048, 32, 8, 8192, 32_000
TOKENS = 512
PEAK = """
import sys
from pathlib import Path
import torch
from nbl_export.calibrate import collect
from nbl_export.model.mapped import mapped_model
checkpoint, scratch, tokens = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
ids = torch.arange(tokens).view(1, -1)
layers = []
with collect.Collection(mapped_model(checkpoint), ("residual",)) as found:
    found.by_layer(ids, lambda sums: layers.append(len(sums)), scratch, lambda done, total: None)
print(len(layers))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.large
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc/self/status")
def test_peak_memory_is_below_half_of_the_weights(tmp_path: Path) -> None:
    """A Llama of 3.4 GB in float32, written one layer a file in bfloat16."""
    checkpoint, scratch = tmp_path / "model", tmp_path / "scratch"
    checkpoint.mkdir()
    scratch.mkdir()
    values = write_checkpoint(checkpoint)
    command = [sys.executable, "-c", PEAK, str(checkpoint), str(scratch), str(TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    layers, kilobytes = map(int, done.stdout.split()[-2:])
    assert layers == LAYERS
    assert values * 4 > 3.3e9
    assert kilobytes * 1024 < values * 4 / 2


def write_checkpoint(directory: Path) -> int:
    """Write a random Llama, one layer in memory at a time, and return how many values it has."""
    from safetensors.torch import save_file

    where: dict[str, str] = {}
    values = 0
    for number, names in enumerate([*map(layer_sizes, range(LAYERS)), END_SIZES]):
        tensors = {name: random(*size) for name, size in names.items()}
        file = f"model-{number + 1:05d}-of-{LAYERS + 1:05d}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        values += sum(tensor.numel() for tensor in tensors.values())
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    write_json(directory / "config.json", config)
    return values


END_SIZES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    "lm_head.weight": (VOCABULARY, HIDDEN),
    "model.norm.weight": (HIDDEN,),
}


def layer_sizes(layer: int) -> dict[str, tuple[int, ...]]:
    """Name and size of every weight of a layer."""
    cached = KV_HEADS * HIDDEN // HEADS
    sizes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (cached, HIDDEN),
        "self_attn.v_proj": (cached, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    return {f"model.layers.{layer}.{name}.weight": size for name, size in sizes.items()}


def random(*size: int) -> torch.Tensor:
    """A matrix that keeps the size of its input, or a norm's vector of ones."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return (torch.randn(size, dtype=torch.float32) / size[-1] ** 0.5).to(torch.bfloat16)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
