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

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nbl_export.errors import NblError
from nbl_export.methods.applied import linearize
from nbl_export.methods.base import Mixer
from nbl_export.model.checkpoint.pretrained import tokenizer_of
from nbl_export.records.destinations import DESTINATIONS
from nbl_export.targets.checkpoint.form import (
    SIZES,
    filled,
    head_dim_of,
    read_weights,
    rope_of,
    write_form,
    write_weights,
)
from nbl_export.trust.model_settings import read_object

__all__ = ["ARCHITECTURES", "check", "load", "remarks", "save"]

ARCHITECTURES = DESTINATIONS["edge-llm"].architectures
_CODE = Path(__file__).with_name("edge_llm_code.py")
_MODULE = "configuration_nbl_edge_llm"
_ATTENTION = "attention"


def check(config: Any, maps: Mapping[int, Mixer]) -> None:
    """Refuse a model that Edge-LLM does not run.

    Raises:
        NblError: the message has the reason.
    """
    form = "--to edge-llm"
    if config.model_type not in ARCHITECTURES:
        raise NblError(f"nbl-export writes {', '.join(ARCHITECTURES)} for {form}, and not {config.model_type}")
    if held := [mixer.kind for mixer in maps.values() if mixer.holds_cache]:
        raise NblError(f"{form} has no place for layers of kind {held[0]}")
    if getattr(config, "sliding_window", None):
        raise NblError(f"{form} has no place for attention with a sliding window")
    if getattr(config, "mlp_bias", False):
        raise NblError(f"{form} has no place for the biases of this model's MLPs")
    if config.hidden_act != "silu":
        raise NblError(f"{form} holds MLPs with silu, and this model's have {config.hidden_act}")
    if rope_of(config)["rope_type"] not in ("default", "llama3"):
        raise NblError(f"{form} has no rotary embeddings of type {rope_of(config)['rope_type']}")


def remarks(directory: Path) -> list[str]:
    """What a user of a directory that `save` wrote must know of Edge-LLM."""
    found = []
    if read_object(directory / "config.json")["rope_parameters"]["rope_type"] == "llama3":
        found.append("Edge-LLM's runtime computes rotary embeddings of type llama3 without their scaling.")
    if not (directory / "chat_template.jinja").is_file():
        found.append("Edge-LLM's exporter asks for a chat template, and the tokenizer has none.")
    return found


def save(model: Any, checkpoint: Path, maps: Mapping[int, Mixer], tap: str, out: Path) -> None:
    """Linearize `model` and round its weights to float16, in place, and save it with the tokenizer of `checkpoint`.

    Raises:
        NblError: see `check`; or float16 cannot hold a weight.
    """
    check(model.config, maps)
    linearize(model, maps, tap)
    weights = {}
    for name, value in model.state_dict().items():
        weights[name] = value.to(torch.float16).contiguous()
        if not torch.isfinite(weights[name]).all():
            raise NblError(f"{name} has numbers above 65,504, which float16 cannot hold; Edge-LLM computes in float16")
        value.copy_(weights[name])
    write_weights(weights, model.config, out)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(out)
    tokenizer_of(checkpoint).save_pretrained(out)
    write_form(_config(model.config, maps, tap), _CODE, out)


def _config(config: Any, maps: Mapping[int, Mixer], tap: str) -> dict[str, Any]:
    types = [_ATTENTION] * config.num_hidden_layers
    for index in maps:
        types[index] = f"mlp_{tap}"
    rope = rope_of(config)
    return {
        "architectures": ["NblEdgeForCausalLM"],
        "model_type": "nbl_edge_llm",
        "auto_map": {"AutoConfig": f"{_MODULE}.NblEdgeConfig"},
        **{name: getattr(config, name, None) for name in SIZES},
        "num_key_value_heads": config.num_key_value_heads,
        "attention_bias": bool(getattr(config, "attention_bias", False)),
        "head_dim": head_dim_of(config),
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
    from transformers import CONFIG_MAPPING

    said = read_object(directory / "config.json")
    values = {name: said[name] for name in (*SIZES, "num_key_value_heads", "attention_bias", "head_dim")}
    config = CONFIG_MAPPING[said["nbl_original_type"]](**values, rope_parameters=said["rope_parameters"])
    linear = [i for i, kind in enumerate(said["layers_block_type"]) if kind != _ATTENTION]
    return filled(config, linear, said["nbl_tap"], read_weights(directory), directory)
