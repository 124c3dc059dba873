"""Peak memory of calibrating a large random Llama one layer at a time.

    python bench/layerwise.py [--layers 16 --hidden 2048 --heads 32 --kv-heads 8 --intermediate 8192 --vocab 128256]
        [--tokens 2048] [--dtype bf16] > bench/results/layerwise-<shape>.json

Random weights are written shard by shard (a layer a file), never held together. Peak memory is VmHWM of a fresh child
process that does nothing but `nbl-export calibrate --layer-wise`; with --whole also of one with the whole model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHILD = """
import os, sys
os.environ["TQDM_DISABLE"] = "1"
from nbl_export.cli import app
app(sys.argv[1:], standalone_mode=False)
status = open("/proc/self/status").read().splitlines()
print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def write_checkpoint(directory: Path, shape: argparse.Namespace) -> int:
    """A random Llama, one layer in memory at a time. Returns its bytes on disk."""
    import torch
    from safetensors.torch import save_file

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[shape.dtype]
    hidden, head = shape.hidden, shape.hidden // shape.heads
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Any:
        return (torch.randn(*size, generator=generator) / size[-1] ** 0.5).to(dtype)

    def one(layer: int) -> dict[str, Any]:
        kv, wide = head * shape.kv_heads, shape.intermediate
        sizes = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }  # fmt: skip
        found = {f"model.layers.{layer}.{name}.weight": random(*size) for name, size in sizes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        return found | {f"model.layers.{layer}.{name}.weight": torch.ones(hidden, dtype=dtype) for name in norms}

    ends = ("model.embed_tokens.weight", "lm_head.weight")
    files = [lambda k=k: one(k) for k in range(shape.layers)]
    files += [lambda name=name: {name: random(shape.vocab, hidden)} for name in ends]
    files += [lambda: {"model.norm.weight": torch.ones(hidden, dtype=dtype)}]
    where: dict[str, str] = {}
    for number, make in enumerate(files):
        tensors, name = make(), f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers, "vocab_size": shape.vocab,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": head,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer: ids below 256."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: k for k, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def calibrate(directory: Path, run: Path, tokens: int, *options: str) -> dict[str, float]:
    words = ["calibrate", "--model", str(directory), "--output", str(run), "--calibration-tokens", str(tokens)]
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, *words, *options], capture_output=True, text=True, check=True)
    seconds = round(time.perf_counter() - started, 1)
    return {"peak_rss_bytes": int(done.stdout.split()[-1]) * 1024, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 16), ("hidden", 2048), ("heads", 32), ("kv-heads", 8), ("intermediate", 8192),
                          ("vocab", 128256), ("tokens", 2048)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--whole", action="store_true", help="measure the whole model in memory too")
    shape = parser.parse_args()
    from nbl_export.bench import machine

    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "model"
        directory.mkdir()
        stored = write_checkpoint(directory, shape)
        write_tokenizer(directory)
        result = {
            "machine": machine(),
            "shape": vars(shape),
            "checkpoint_bytes": stored,
            "float32_bytes": stored * (2 if shape.dtype == "bf16" else 1),
            "layer_wise": calibrate(directory, Path(scratch) / "run", shape.tokens, "--layer-wise"),
            "moments_file_bytes": (Path(scratch) / "run" / "moments.safetensors").stat().st_size,
        }
        if shape.whole:
            result["whole_model"] = calibrate(directory, Path(scratch) / "whole", shape.tokens)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
