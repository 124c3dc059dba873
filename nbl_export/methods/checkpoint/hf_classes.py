"""NBL models for transformers: configuration and model classes, registered when this module is imported.

    import nbl_export.hf                                   # no remote code: the classes are in this package
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY)

    config.json   model_type "nbl-llama", everything of a Llama's, "nbl_replaced_layers": [0, 7], "nbl_tap": "residual",
                  "nbl_kinds": a method's name a layer unless it is linear, "nbl_exit" what its maps have in common
    weights       model.layers.{i}.self_attn.linear.{weight,bias} of a linear layer; a residual tap has no input norm
                  model.layers.{i}.self_attn.mixer.linear.{weight,bias} of predicted KV, beside the layer's attention

Each architecture (`architectures`) has a pair of classes, e.g. NblLlamaConfig and NblLlamaForCausalLM. A model class is
the stock class whose attention is replaced after construction (`linearize`), so no modelling code is copied. With an
exit layer the model computes what is served (`methods.predicted_kv.torch_layers`). `import nbl_export` does not
register the classes, since it must not load torch and transformers.

`restored` makes a stock model of a linearized one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from nbl_export.errors import NblError
from nbl_export.methods import METHODS, method_of
from nbl_export.methods.applied import BESIDE, architecture_of, linearize, multiplier_of, replace_attention
from nbl_export.methods.base import Mixer
from nbl_export.model.architecture_record import Architecture
from nbl_export.model.architectures import ARCHITECTURES, LINEARIZED
from nbl_export.model.checkpoint.pretrained import model_with, quiet_transformers, tokenizer_of
from nbl_export.records.plan import USUAL_KIND
from nbl_export.trust.model_settings import drop_code

__all__ = ["CLASSES", "empty_linearized", "linearized", "restored", "save_linearized"]

_OF_CLASS = ("architectures", "model_type")  # values of a configuration that another class does not take over


def _exchange(model: Any) -> None:
    """Replace attention by blank mixers, as the configuration says.

    Raises:
        ValueError: the configuration names layers that do not exist, all layers, an unknown tap, or an impossible exit.
        NblError: this architecture cannot have predicted KV.
    """
    config = model.config
    replaced = config.nbl_replaced_layers or []
    count = config.num_hidden_layers
    if not set(replaced) < set(range(count)) or config.nbl_tap not in architecture_of(config).taps:
        raise ValueError(f"config.json replaces layers {replaced} of {count} at the tap {config.nbl_tap!r}")
    kinds = set(config.nbl_kinds or [USUAL_KIND])
    if len(kinds) != 1 or not kinds <= set(METHODS):
        known = ", ".join(METHODS)
        raise ValueError(f"config.json has layers of the kinds {sorted(kinds)}; it takes one of {known} for all")
    method = METHODS[kinds.pop()]
    method.check_facts(config.nbl_exit, replaced, count, config.max_position_embeddings)
    decoder = model.get_decoder()
    multiplier = multiplier_of(config)
    blanks = {i: method.blank(config, decoder, config.nbl_exit, multiplier) for i in replaced}
    replace_attention(model, blanks, config.nbl_tap)


def _classes_of(record: Architecture) -> tuple[Any, Any]:
    """Configuration and model class of an architecture: stock classes with four more values and replaced attention."""
    model_base = getattr(transformers, f"{record.classes}ForCausalLM")
    config_base = model_base.config_class
    name = f"Nbl{record.classes}"
    fields = {
        "__annotations__": {
            "nbl_replaced_layers": list[int] | None,
            "nbl_kinds": list[str] | None,
            "nbl_exit": dict[str, Any] | None,
            "nbl_tap": str,
        },
        "__module__": __name__,
        "__doc__": f"Configuration of a {record.classes} with mixers instead of attention in some layers.",
        "model_type": f"{LINEARIZED}{record.name}",
        "nbl_replaced_layers": None,
        "nbl_kinds": None,
        "nbl_exit": None,
        "nbl_tap": "residual",
    }
    config_class = strict(type(f"{name}Config", (config_base,), fields))

    def build(self: Any, config: Any) -> None:
        model_base.__init__(self, config)
        _exchange(self)

    members = {
        "__module__": __name__,
        "__doc__": f"`{model_base.__name__}` with mixers instead of attention in `config.nbl_replaced_layers`.",
        "__init__": build,
        "config_class": config_class,
    }
    return config_class, type(f"{name}ForCausalLM", (model_base,), members)


# model_type of the original -> configuration and model class
CLASSES: dict[str, tuple[Any, Any]] = {name: _classes_of(record) for name, record in ARCHITECTURES.items()}


for _config_class, _model_class in CLASSES.values():
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    AutoModelForCausalLM.register(_config_class, _model_class, exist_ok=True)


def save_linearized(model: Any, checkpoint: Path, maps: Mapping[int, Mixer], tap: str, out: Path) -> None:
    """Linearize `model` in place and save it with the tokenizer of `checkpoint`.

    Raises:
        NblError: the model's architecture has no class here.
    """
    quiet_transformers()
    linearized(model, maps, tap).save_pretrained(out)
    tokenizer_of(checkpoint).save_pretrained(out)
    drop_code(out)


def linearized(model: Any, maps: Mapping[int, Mixer], tap: str) -> Any:
    """A model of the class here, with the weights of `model`, which is linearized in place.

    Raises:
        NblError: the model's architecture has no class here.
    """
    made = empty_linearized(model.config, maps, tap)
    made.load_state_dict(linearize(model, maps, tap).state_dict(), assign=True)
    for name, buffer in model.named_buffers():  # those that no state has, such as rotary frequencies
        owner, _, own = name.rpartition(".")
        made.get_submodule(owner)._buffers[own] = buffer
    made.generation_config = model.generation_config or GenerationConfig.from_model_config(made.config)
    return made.eval()


def empty_linearized(config: Any, maps: Mapping[int, Mixer], tap: str) -> Any:
    """A model of the class here on torch's meta device, from the original's configuration.

    Raises:
        NblError: the model's architecture has no class here.
    """
    if config.model_type not in CLASSES:
        raise NblError(f"no NBL checkpoint of architecture {config.model_type}; there are {', '.join(CLASSES)}")
    config_class, model_class = CLASSES[config.model_type]
    values = {k: v for k, v in config.to_dict().items() if k not in _OF_CLASS}
    kinds = [maps[i].kind for i in sorted(maps)]
    given = None if set(kinds) == {USUAL_KIND} else kinds  # stock configurations leave out what is None
    common = method_of(maps).facts(maps)
    facts = {"nbl_replaced_layers": sorted(maps), "nbl_tap": tap, "nbl_kinds": given, "nbl_exit": common}
    made_for = config_class(**values, **facts)
    with torch.device("meta"):
        return model_class(made_for)


def restored(model: Any) -> Any:
    """The stock model of a loaded NBL model: attention that was replaced is zeros, and missing norms are ones.

    Raises:
        NblError: weights of neither attention nor norms are missing.
    """
    config = model.config
    kinds = config.nbl_kinds or [USUAL_KIND] * len(config.nbl_replaced_layers)
    layers = [i for i, kind in zip(config.nbl_replaced_layers, kinds, strict=True) if not METHODS[kind].holds_cache]
    left_out = (*(f".{i}.self_attn." for i in layers), f".self_attn.{BESIDE}.")
    values = {k: v for k, v in config.to_dict().items() if k not in _OF_CLASS and not k.startswith("nbl_")}
    with torch.device("meta"):
        stock = model_with(type(config).__mro__[1](**values))  # the stock class that this class derives from
    kept = {name: value for name, value in model.state_dict().items() if not any(part in name for part in left_out)}
    missing = {name: value.shape for name, value in stock.state_dict().items() if name not in kept}
    foreign = [name for name in missing if ".self_attn." not in name and "norm" not in name]
    if foreign:
        raise NblError(f"the checkpoint lacks the weights {foreign[0]}; fetch the model again")
    blank = {n: torch.ones(shape) if n.endswith("norm.weight") else torch.zeros(shape) for n, shape in missing.items()}
    stock.load_state_dict({**kept, **blank}, assign=True)
    stock.tie_weights()
    stock.generation_config = model.generation_config
    return stock
