"""NBL models in the form of Nemotron-NAS checkpoints, whose layers may have a linear layer instead of attention.

    config.json   "block_configs": [{"attention": {"n_heads_in_group": 3, "no_op": false, "replace_with_linear": false},
                                     "ffn": {"ffn_mult": 4.0, ...}}, ...]
    weights       model.layers.{i}.self_attn.{linear_attn | linear}.weight [D, D], of the normed input, without a bias

Readers compute the width of an MLP from its multiplier: the next multiple of 256 above int(2 * ffn_mult * D / 3).
Sources: TensorRT-LLM, _torch/models/modeling_nemotron_nas.py, and llama.cpp, conversion/deci.py, which name the matrix
linear_attn; mlx-lm 0.32, models/nemotron-nas.py, which names it linear and takes its mask from layer 0.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbl_export.errors import CorruptError, NblError
from nbl_export.mixers import kind_of
from nbl_export.mixers.base import Mixer
from nbl_export.model.checkpoint.pretrained import model_with
from nbl_export.model.linearize import linearize
from nbl_export.records.destinations import DESTINATIONS
from nbl_export.targets.export.finish import add_text_files
from nbl_export.trust.model_settings import drop_code, read_object

__all__ = ["MATRIX", "check", "check_vocabulary", "load", "save"]

# Form, as `convert --to` names it -> name of a layer's matrix.
MATRIX = {"nemotron-nas": "linear_attn", "mlx": "linear"}
_MULTIPLE = 256
_LLAMA_3, _MOST_TOKENIZER = 128_256, 64 << 20  # tokens, and bytes of tokenizer.json
_CODE = Path(__file__).with_name("nemotron_nas_config.py")
_MODULE = "configuration_nbl_nas"
_SCALED = ("linear", "llama3", "yarn")  # rotary embeddings that both readers know


def check(config: Any, replaced: tuple[int, ...], form: str) -> None:
    """Refuse a model that the form does not hold.

    Raises:
        NblError: the message has the reason.
    """
    if config.model_type not in DESTINATIONS["tensorrt-llm"].architectures:
        raise NblError(f"--to {form} holds Llama's attention and MLP, and {config.model_type} is another architecture")
    if getattr(config, "sliding_window", None):
        raise NblError(f"--to {form} has no place for a sliding window")
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise NblError(f"--to {form} has no place for the biases of this model's projections")
    if config.intermediate_size % _MULTIPLE:
        raise NblError(
            f"--to {form} rounds the width of an MLP to a multiple of {_MULTIPLE}, and this model's is "
            f"{config.intermediate_size}"
        )
    if config.hidden_size != config.num_attention_heads * _head_dim(config):
        raise NblError(f"--to {form} computes the size of a head from the hidden size, and this model states another")
    if _scaling(config).get("rope_type", "default") not in ("default", *_SCALED):
        raise NblError(f"--to {form} has no rotary embeddings of type {_scaling(config)['rope_type']}")
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
    from huggingface_hub import save_torch_state_dict

    check(model.config, tuple(maps), form)
    out.mkdir(parents=True)
    linearize(model, maps, "normed")
    weights = {}
    for name, value in model.state_dict().items():
        if name.endswith(".self_attn.linear.bias"):
            continue
        weights[name.replace(".self_attn.linear.", f".self_attn.{MATRIX[form]}.")] = value.contiguous()
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_torch_state_dict(weights, out)
    add_text_files(checkpoint, out)  # readers have transformers 4
    drop_code(out)  # before ours is named
    config = _config(model.config, tuple(sorted(maps)))
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(_CODE, out / f"{_MODULE}.py")


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _scaling(config: Any) -> dict[str, Any]:
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return dict(found)


def _config(config: Any, replaced: tuple[int, ...]) -> dict[str, Any]:
    scaling = _scaling(config)
    theta = scaling.pop("rope_theta", None) or getattr(config, "rope_theta", 10000.0)
    group = config.num_attention_heads // config.num_key_value_heads
    blocks = [
        {
            "attention": _record(n_heads_in_group=None if i in replaced else group, linear=i in replaced),
            "ffn": _record(ffn_mult=_multiplier(config), linear=False),
        }
        for i in range(config.num_hidden_layers)
    ]
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
            "vocab_size", "max_position_embeddings", "tie_word_embeddings", "hidden_act", "bos_token_id",
            "eos_token_id", "pad_token_id")  # fmt: skip
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": f"{_MODULE}.NblNasConfig"},
        **{name: getattr(config, name, None) for name in kept},
        "num_key_value_heads": None,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": float(theta),
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
        "torch_dtype": "float32",
        "block_configs": blocks,
        "nbl_replaced_layers": list(replaced),
        "nbl_num_key_value_heads": config.num_key_value_heads,
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
    from safetensors.torch import load_file
    from transformers import LlamaConfig

    said = read_object(directory / "config.json")
    blocks = said["block_configs"]
    replaced = tuple(i for i, b in enumerate(blocks) if b["attention"]["replace_with_linear"])
    group = next(b["attention"]["n_heads_in_group"] for b in blocks if b["attention"]["n_heads_in_group"])
    own = (
        "block_configs",
        "auto_map",
        "model_type",
        "architectures",
        "num_key_value_heads",
        "rope_scaling",
        "rope_theta",
    )
    values = {k: v for k, v in said.items() if k not in own and not k.startswith("nbl_")}
    rope = {"rope_type": "default", **(said["rope_scaling"] or {}), "rope_theta": said["rope_theta"]}
    config = LlamaConfig(**values, num_key_value_heads=said["num_attention_heads"] // group, rope_parameters=rope)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        weights |= load_file(file)
    maps = {}
    for i in replaced:
        names = [f"model.layers.{i}.self_attn.{name}.weight" for name in MATRIX.values()]
        found = next((weights.pop(name) for name in names if name in weights), None)
        if found is None:
            raise CorruptError(f"{directory} has no matrix of layer {i}, which its config.json replaces; convert again")
        tensors = {"weight": found.float().numpy(), "bias": np.zeros(len(found), np.float32)}
        maps[i] = kind_of("linear").from_tensors(tensors)
    model = model_with(config)
    missing = {n: v.shape for n, v in model.state_dict().items() if n not in weights}
    foreign = [n for n in missing if ".self_attn." not in n and n != "lm_head.weight"]
    if foreign:
        raise CorruptError(f"{directory} lacks {foreign[0]}; convert again")
    blank = {n: torch.zeros(shape) for n, shape in missing.items()}
    model.load_state_dict({**weights, **blank}, assign=True)
    model.tie_weights()
    return linearize(model, maps, "normed")
