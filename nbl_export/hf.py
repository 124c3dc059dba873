"""NBL models for transformers: configuration and model classes, registered when this module is imported.

    import nbl_export.hf                                   # no remote code: the classes are in this package
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY)

    config.json   model_type "nbl-llama", everything of a Llama's, "nbl_replaced_layers": [0, 7], "nbl_tap": "residual"
    weights       model.layers.{i}.self_attn.linear.{weight,bias} of a replaced layer; a residual tap has no input norm

A model class is the stock one with its attention exchanged after construction (`linearize`): no modelling code is
copied. `import nbl_export` does not register, since it must not load torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from nbl_export.checkpoint import LINEARIZED, quiet_transformers
from nbl_export.errors import NblError
from nbl_export.linearize import AffineAttention, linearize, replace_attention
from nbl_export.records import TAPS, AffineMap

__all__ = [
    "NblLlamaConfig",
    "NblLlamaForCausalLM",
    "NblMistralConfig",
    "NblMistralForCausalLM",
    "save_linearized",
]


@strict
class NblLlamaConfig(LlamaConfig):
    """A Llama of which some layers have an affine map instead of attention."""

    model_type = f"{LINEARIZED}llama"
    nbl_replaced_layers: list[int] | None = None
    nbl_tap: str = "residual"


@strict
class NblMistralConfig(MistralConfig):
    """A Mistral of which some layers have an affine map instead of attention."""

    model_type = f"{LINEARIZED}mistral"
    nbl_replaced_layers: list[int] | None = None
    nbl_tap: str = "residual"


def _exchange(model: Any) -> None:
    """Attention out, blank maps in, as the configuration says.

    Raises:
        ValueError: it names layers that the model does not have, all of them, or an unknown tap.
    """
    config = model.config
    replaced, layers = config.nbl_replaced_layers or [], config.num_hidden_layers
    if not set(replaced) < set(range(layers)) or config.nbl_tap not in TAPS:
        raise ValueError(f"config.json replaces layers {replaced} of {layers} at the tap {config.nbl_tap!r}")
    replace_attention(model, {i: AffineAttention.blank(config.hidden_size) for i in replaced}, config.nbl_tap)


class NblLlamaForCausalLM(LlamaForCausalLM):
    """`LlamaForCausalLM` with the attention of `config.nbl_replaced_layers` exchanged."""

    config_class = NblLlamaConfig

    def __init__(self, config: NblLlamaConfig) -> None:
        super().__init__(config)
        _exchange(self)


class NblMistralForCausalLM(MistralForCausalLM):
    """`MistralForCausalLM` with the attention of `config.nbl_replaced_layers` exchanged."""

    config_class = NblMistralConfig

    def __init__(self, config: NblMistralConfig) -> None:
        super().__init__(config)
        _exchange(self)


_CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (NblLlamaConfig, NblLlamaForCausalLM),
    "mistral": (NblMistralConfig, NblMistralForCausalLM),
}

for _config_class, _model_class in _CLASSES.values():
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    AutoModelForCausalLM.register(_config_class, _model_class, exist_ok=True)


def save_linearized(model: Any, checkpoint: Path, maps: Mapping[int, AffineMap], tap: str, out: Path) -> None:
    """Linearize `model` in place and save it with the tokenizer of `checkpoint`.

    Raises:
        NblError: the model's architecture has no class here.
    """
    quiet_transformers()
    config = model.config
    if config.model_type not in _CLASSES:
        raise NblError(f"no NBL checkpoint of architecture {config.model_type}; there are {', '.join(_CLASSES)}")
    config_class, model_class = _CLASSES[config.model_type]
    values = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
    made_for = config_class(**values, nbl_replaced_layers=sorted(maps), nbl_tap=tap)
    with torch.device("meta"):
        saved = model_class(made_for)
    saved.load_state_dict(linearize(model, maps, tap).state_dict(), assign=True)
    saved.generation_config = model.generation_config or GenerationConfig.from_model_config(made_for)
    saved.save_pretrained(out)
    AutoTokenizer.from_pretrained(str(checkpoint)).save_pretrained(out)
