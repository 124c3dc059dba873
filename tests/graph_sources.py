"""Decoder graphs as each exporter makes them, from one tiny checkpoint. No network.

optimum-onnx needs an older transformers and so an environment of its own: `torchscript` makes a graph in its form here,
and where NBL_OPTIMUM_PYTHON names the interpreter of such an environment, `optimum` makes the real one:

    python -m venv E; E/bin/pip install optimum-onnx==0.1.0; export NBL_OPTIMUM_PYTHON=E/bin/python
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["OPTIMUM_PYTHON", "make_graph"]

OPTIMUM_PYTHON = os.environ.get("NBL_OPTIMUM_PYTHON")
_BATCH, _PAST, _TOKENS = 2, 5, 7  # of the traced sample; a batch of 1 would be taken for a constant


def make_graph(name: str, checkpoint: Path, out: Path) -> Path:
    """A directory with model.onnx: genai-PRECISION, mobius-default|cpu|fp16, transformers-OPSET[-fused][-positions],
    torchscript or optimum."""  # fmt: skip
    source, *words = name.split("-")
    if source == "genai":
        from nbl_export.targets import load_engine
        from nbl_export.targets.base import ExportSettings

        target = load_engine("ort", "cuda" if words[0] == "fp16" else "cpu")
        target.export(checkpoint, out, ExportSettings("genai", words[0]))
    elif source == "mobius":
        _mobius(checkpoint, out, words[0])
    elif source == "transformers":
        _transformers(checkpoint, out, int(words[0]), "fused" in words, "positions" in words)
    elif source == "torchscript":
        _torchscript(checkpoint, out)
    else:
        _optimum(checkpoint, out)
    return out


def _mobius(checkpoint: Path, out: Path, flavour: str) -> None:
    from mobius.__main__ import main

    ep, dtype = ("cpu", "f16") if flavour == "fp16" else (flavour, "f32")
    main(["build", "--config", str(checkpoint), "--ep", ep, "--dtype", dtype, "--runtime", "ort-genai", str(out)])
    shutil.copyfile(checkpoint / "config.json", out / "config.json")  # mobius says 4096 positions of every model


def _load(checkpoint: Path, **options: Any) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, **options).eval()


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _transformers(checkpoint: Path, out: Path, opset: int, fused: bool, positions: bool) -> None:
    import torch
    from transformers import DynamicCache
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = _load(checkpoint)
    cache = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        key, value = (
            torch.randn(_BATCH, model.config.num_key_value_heads, _PAST, _head_dim(model.config)) for _ in range(2)
        )
        cache.update(key, value, layer)
    mask = torch.ones(_BATCH, _PAST + _TOKENS, dtype=torch.long)
    mask[0, :2] = 0  # a mask of ones would be taken for no mask
    sample = {"input_ids": torch.ones(_BATCH, _TOKENS, dtype=torch.long), "attention_mask": mask,
              "past_key_values": cache}  # fmt: skip
    if positions:
        sample["position_ids"] = (torch.arange(_TOKENS) + _PAST).repeat(_BATCH, 1)
    config = OnnxConfig(dynamic=True, opset_version=opset, ort_fusions="cpu" if fused else None)
    OnnxExporter().export(model, sample, config=config).save_pretrained(out)


def _torchscript(checkpoint: Path, out: Path) -> None:
    import torch
    from transformers import DynamicCache

    model = _load(checkpoint, attn_implementation="eager")
    layers = model.config.num_hidden_layers

    class Flat(torch.nn.Module):
        """Caches as single tensors, and the mask as optimum-onnx has it made: without transformers' vmap."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, mask: Any, positions: Any, *past: Any) -> tuple[Any, ...]:
            cache = DynamicCache(config=model.config)
            for layer in range(layers):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            tokens, total = ids.shape[1], mask.shape[1]
            queries, keys = torch.arange(tokens)[:, None] + (total - tokens), torch.arange(total)[None]
            seen = (keys <= queries)[None, None] & mask.bool()[:, None, None, :]
            bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
            found = self.model(ids, attention_mask=bias, position_ids=positions, past_key_values=cache, use_cache=True)
            return (found.logits, *(t for layer in cache.layers for t in (layer.keys, layer.values)))

    names = [f"past_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value")]
    presents = [name.replace("past_key_values", "present") for name in names]
    ids, mask = torch.ones(_BATCH, _TOKENS, dtype=torch.long), torch.ones(_BATCH, _PAST + _TOKENS, dtype=torch.long)
    past = [torch.randn(_BATCH, model.config.num_key_value_heads, _PAST, _head_dim(model.config)) for _ in names]
    known, total = "past_sequence_length", "past_sequence_length + sequence_length"
    axes = {
        **{name: {0: "batch_size", 1: "sequence_length"} for name in ("input_ids", "position_ids", "logits")},
        "attention_mask": {0: "batch_size", 1: total},
        **{name: {0: "batch_size", 2: known} for name in names},
        **{name: {0: "batch_size", 2: total} for name in presents},
    }
    out.mkdir()
    torch.onnx.export(
        Flat(), (ids, mask, (torch.arange(_TOKENS) + _PAST).repeat(_BATCH, 1), *past), str(out / "model.onnx"),
        input_names=["input_ids", "attention_mask", "position_ids", *names], output_names=["logits", *presents],
        dynamic_axes=axes, opset_version=18, dynamo=False,
    )  # fmt: skip
    shutil.copyfile(checkpoint / "config.json", out / "config.json")


_OPTIMUM = """
import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], sys.argv[2], task="text-generation-with-past", do_validation=False)
"""


def _optimum(checkpoint: Path, out: Path) -> None:
    """In its own environment, whose transformers 4 reads no tokenizer or rotation as transformers 5 writes it."""
    assert OPTIMUM_PYTHON is not None
    older = out.with_name("older")
    shutil.copytree(checkpoint, older)
    path = older / "tokenizer_config.json"
    settings = {**json.loads(path.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings), encoding="utf-8")
    config = json.loads((older / "config.json").read_text(encoding="utf-8"))
    config |= {k: v for k, v in (config.get("rope_parameters") or {}).items() if k == "rope_theta"}
    (older / "config.json").write_text(json.dumps(config), encoding="utf-8")
    command = [OPTIMUM_PYTHON, "-c", _OPTIMUM, str(older), str(out)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
