"""NBL models in the form of Nemotron-NAS checkpoints, whose layers may have a linear layer instead of attention.

    config.json   "block_configs": [{"attention": {"n_heads_in_group": 3, "no_op": false, "replace_with_linear": false},
                                     "ffn": {"ffn_mult": 4.0, ...}}, ...]
    weights       model.layers.{i}.self_attn.{linear_attn | linear}.weight [D, D], of the normed input, without a bias

Readers compute the width of an MLP from its multiplier: the next multiple of 256 above int(2 * ffn_mult * D / 3).
Sources: TensorRT-LLM, _torch/models/modeling_nemotron_nas.py, and llama.cpp, conversion/deci.py, which name the matrix
linear_attn; mlx-lm 0.32, models/nemotron-nas.py, which names it linear and takes its mask from layer 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nbl_export.errors import NblError
from nbl_export.methods.applied import linearize
from nbl_export.methods.base import Mixer
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
from nbl_export.targets.export.finish import add_text_files
from nbl_export.trust.model_settings import read_object

__all__ = ["MATRIX", "check", "check_vocabulary", "load", "save"]

# Form, as `convert --to` names it -> name of a layer's matrix.
MATRIX = {"nemotron-nas": "linear_attn", "mlx": "linear"}
_MULTIPLE = 256
_LLAMA_3 = 128_256  # tokens, and bytes of tokenizer.json
_MOST_TOKENIZER = 64 << 20
_CODE = Path(__file__).with_name("nemotron_nas_config.py")
_MODULE = "configuration_nbl_nas"
_SCALED = ("linear", "llama3", "yarn")  # rotary embeddings that both readers know


def check(config: Any, replaced: tuple[int, ...], form: str) -> None:
    """Refuse a model that the form does not hold.

    Raises:
        NblError: the message has the reason.
    """
    if config.model_type not in DESTINATIONS["tensorrt-llm"].architectures:
        raise NblError(f"nbl-export writes llama and mistral as {form}, and not {config.model_type}")
    if getattr(config, "sliding_window", None):
        raise NblError(f"--to {form} has no place for a sliding window")
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise NblError(f"--to {form} has no place for the biases of this model's projections")
    if config.intermediate_size % _MULTIPLE:
        raise NblError(
            f"--to {form} rounds the width of an MLP to a multiple of {_MULTIPLE}, and this model's is "
            f"{config.intermediate_size}"
        )
    if config.hidden_size != config.num_attention_heads * head_dim_of(config):
        raise NblError(f"--to {form} computes the size of a head from the hidden size, and this model states another")
    if rope_of(config)["rope_type"] not in ("default", *_SCALED):
        raise NblError(f"--to {form} has no rotary embeddings of type {rope_of(config)['rope_type']}")
    if form == "mlx" and 0 in replaced:
        raise NblError("mlx-lm takes its mask from layer 0, which is replaced; replace other layers (--layers)")


def check_vocabulary(directory: Path, size: int) -> None:
    """Refuse a vocabulary that llama.cpp's converter does not take with this form (conversion/deci.py, line 95).

    Raises:
        NblError: it is neither Llama 3's nor one with byte fallback.
    """
    file = directory / "tokenizer.json"
    if size == _LLAMA_3 or not file.is_file():
        return
    model = read_object(file, _MOST_TOKENIZER).get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise NblError(
            "llama.cpp's converter takes the vocabularies of Llama 2 and 3 with this form, and this model has another; "
            "--for tensorrt-llm writes the same form"
        )


def save(model: Any, checkpoint: Path, maps: Mapping[int, Mixer], form: str, out: Path) -> None:
    """Linearize `model` in place and save it with the tokenizer of `checkpoint`.

    Args:
        maps: without biases, on the normed input.

    Raises:
        NblError: see `check`.
    """
    check(model.config, tuple(maps), form)
    linearize(model, maps, "normed")
    weights = {}
    for name, value in model.state_dict().items():
        if name.endswith(".self_attn.linear.bias"):
            continue
        weights[name.replace(".self_attn.linear.", f".self_attn.{MATRIX[form]}.")] = value.contiguous()
    write_weights(weights, model.config, out)
    add_text_files(checkpoint, out)  # readers have transformers 4
    write_form(_config(model.config, tuple(sorted(maps))), _CODE, out)


def _config(config: Any, replaced: tuple[int, ...]) -> dict[str, Any]:
    scaling = rope_of(config)
    theta = scaling.pop("rope_theta")
    group = config.num_attention_heads // config.num_key_value_heads
    blocks = [
        {
            "attention": _record(n_heads_in_group=None if i in replaced else group, linear=i in replaced),
            "ffn": _record(ffn_mult=_multiplier(config), linear=False),
        }
        for i in range(config.num_hidden_layers)
    ]
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": f"{_MODULE}.NblNasConfig"},
        **{name: getattr(config, name, None) for name in SIZES},
        "num_key_value_heads": None,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": float(theta),
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "torch_dtype": "float32",
        "block_configs": blocks,
        "nbl_replaced_layers": list(replaced),
    }


def _record(*, linear: bool, **sizes: Any) -> dict[str, Any]:
    return {**sizes, "no_op": False, "replace_with_linear": linear}


def _multiplier(config: Any) -> float:
    """The multiplier from which readers get the width of an MLP; mlx-lm rounds it to six decimals."""
    return round(3 * config.intermediate_size / (2 * config.hidden_size), 6)


def load(directory: Path) -> Any:
    """The torch model of a directory that `save` wrote, as a stock Llama with maps; for parity.

    Raises:
        CorruptError: the weights are not those that config.json names.
    """
    from transformers import LlamaConfig

    said = read_object(directory / "config.json")
    layers = [block["attention"] for block in said["block_configs"]]
    linear = [i for i, layer in enumerate(layers) if layer["replace_with_linear"]]
    group = next(layer["n_heads_in_group"] for layer in layers if layer["n_heads_in_group"])
    values = {name: said[name] for name in SIZES} | {"num_key_value_heads": said["num_attention_heads"] // group}
    rope = {"rope_type": "default", **(said["rope_scaling"] or {}), "rope_theta": said["rope_theta"]}
    config = LlamaConfig(**values, rope_parameters=rope)
    weights = read_weights(directory)
    for name in [n for n in weights if any(n.endswith(f".self_attn.{own}.weight") for own in MATRIX.values())]:
        prefix = name.rpartition(".self_attn.")[0]
        matrix = weights.pop(name)
        weights[f"{prefix}.self_attn.linear.weight"] = matrix
        weights[f"{prefix}.self_attn.linear.bias"] = torch.zeros(len(matrix))
    return filled(config, linear, "normed", weights, directory)
