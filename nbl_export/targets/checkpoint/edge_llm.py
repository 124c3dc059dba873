"""NBL models as checkpoints of TensorRT-Edge-LLM, whose exporter makes a graph with fewer caches of them.

    config.json   "layers_block_type": ["attention", "mlp_normed", ...], the other values of a Llama's
    weights       model.layers.{i}.self_attn.linear.{weight, bias}, float16; a residual tap has no input norm
    code          `edge_llm_code.py`, which the exporter runs, and which registers a class by the package's own function

Edge-LLM 0.11 has no linear layer of its own: the default class builds attention in each layer (models/default/
modeling_default.py), and Nemotron-H's layers without a cache are MLPs, beside attention without positions. What follows
the class takes fewer caches than layers: the exporter lists those of attention as `kv_layer_configs`
(checkpoint/checkpoint_utils.py), and its C++ builder and runtime count that list (llmBuilder.cpp, llmEngineConfig.cpp).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nbl_export.errors import CorruptError, NblError
from nbl_export.mixers import kind_of
from nbl_export.mixers.base import Mixer
from nbl_export.model.checkpoint.pretrained import model_with, tokenizer_of
from nbl_export.model.linearize import linearize, replace_attention
from nbl_export.records.destinations import DESTINATIONS
from nbl_export.trust.model_settings import drop_code, read_object

__all__ = ["ARCHITECTURES", "check", "load", "remarks", "save"]

ARCHITECTURES = DESTINATIONS["edge-llm"].architectures
_CODE = Path(__file__).with_name("edge_llm_code.py")
_MODULE = "configuration_nbl_edge_llm"
_ATTENTION, _NONE = "attention", "mlp_none"
# What config.json has of the original's configuration.
_KEPT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "rms_norm_eps", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "hidden_act",
         "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip


def check(config: Any, maps: Mapping[int, Mixer]) -> None:
    """Refuse a model that Edge-LLM does not run.

    Raises:
        NblError: the message has the reason.
    """
    form = "--to edge-llm"
    if config.model_type not in ARCHITECTURES:
        raise NblError(f"{form} holds {', '.join(ARCHITECTURES)}, and {config.model_type} is another architecture")
    if held := [mixer.kind for mixer in maps.values() if mixer.holds_cache]:
        raise NblError(f"{form} has no place for layers of kind {held[0]}")
    if getattr(config, "sliding_window", None):
        raise NblError(f"{form} has no place for attention with a sliding window")
    if getattr(config, "mlp_bias", False):
        raise NblError(f"{form} has no place for the biases of this model's MLPs")
    if config.hidden_act != "silu":
        raise NblError(f"{form} holds MLPs with silu, and this model's have {config.hidden_act}")
    if _rope(config)["rope_type"] not in ("default", "llama3"):
        raise NblError(f"{form} has no rotary embeddings of type {_rope(config)['rope_type']}")


def remarks(directory: Path) -> list[str]:
    """What a user of a directory that `save` wrote must know of Edge-LLM."""
    found = []
    if read_object(directory / "config.json")["rope_parameters"]["rope_type"] == "llama3":
        found.append("Edge-LLM's runtime computes rotary embeddings of type llama3 without their scaling.")
    if not (directory / "chat_template.jinja").is_file():
        found.append("Edge-LLM's exporter asks for a chat template, and the tokenizer has none.")
    return found


def _rope(config: Any) -> dict[str, Any]:
    found = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    found.setdefault("rope_type", "default")
    found.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10_000.0)
    return found


def save(model: Any, checkpoint: Path, maps: Mapping[int, Mixer], tap: str, out: Path) -> None:
    """Linearize `model` and round its weights to float16, in place, and save it with the tokenizer of `checkpoint`.

    Raises:
        NblError: see `check`; or float16 cannot hold a weight.
    """
    from huggingface_hub import save_torch_state_dict

    check(model.config, maps)
    linearize(model, maps, tap)
    weights = {}
    for name, value in model.state_dict().items():
        weights[name] = value.to(torch.float16).contiguous()
        if not torch.isfinite(weights[name]).all():
            raise NblError(f"{name} has numbers above 65,504, which float16 cannot hold; Edge-LLM computes in float16")
        value.copy_(weights[name])
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    out.mkdir(parents=True)
    save_torch_state_dict(weights, out)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(out)
    tokenizer_of(checkpoint).save_pretrained(out)
    drop_code(out)  # before ours is named
    (out / "config.json").write_text(json.dumps(_config(model.config, maps, tap), indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(_CODE, out / f"{_MODULE}.py")


def _config(config: Any, maps: Mapping[int, Mixer], tap: str) -> dict[str, Any]:
    types = [_ATTENTION] * config.num_hidden_layers
    for index, mixer in maps.items():
        types[index] = f"mlp_{tap}" if mixer.kind == "linear" else _NONE
    rope = _rope(config)
    return {
        "architectures": ["NblEdgeForCausalLM"],
        "model_type": "nbl_edge_llm",
        "auto_map": {"AutoConfig": f"{_MODULE}.NblEdgeConfig"},
        **{name: getattr(config, name, None) for name in _KEPT},
        "attention_bias": bool(getattr(config, "attention_bias", False)),
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "rope_theta": float(rope["rope_theta"]),
        "rope_parameters": rope,
        "torch_dtype": "float16",
        "layers_block_type": types,
        "nbl_original_type": config.model_type,
        "nbl_tap": tap,
    }


def load(directory: Path) -> Any:
    """The torch model of a directory that `save` wrote, in float32; for parity.

    Raises:
        CorruptError: the weights are not those that config.json names.
    """
    from safetensors.torch import load_file
    from transformers import CONFIG_MAPPING

    said = read_object(directory / "config.json")
    values = {name: said[name] for name in (*_KEPT, "attention_bias", "head_dim")}
    model = model_with(CONFIG_MAPPING[said["nbl_original_type"]](**values, rope_parameters=said["rope_parameters"]))
    kinds = {i: kind for i, kind in enumerate(said["layers_block_type"]) if kind != _ATTENTION}
    blanks = {i: kind_of("none" if kind == _NONE else "linear").blank(said["hidden_size"]) for i, kind in kinds.items()}
    replace_attention(model, blanks, said["nbl_tap"])
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        weights |= {name: value.float() for name, value in load_file(file).items()}
    missing = [name for name in model.state_dict() if name not in weights and name != "lm_head.weight"]
    if missing:
        raise CorruptError(f"{directory} lacks {missing[0]}, which its config.json names; convert again")
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.eval()
