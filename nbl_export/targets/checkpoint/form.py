"""What checkpoints in the forms of other engines share: their files, and reading them back for parity.

*.safetensors   weights
config.json     settings, which name the code
NAME.py         code that reads the settings
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nbl_export.errors import CorruptError
from nbl_export.methods import METHODS
from nbl_export.methods.applied import replace_attention
from nbl_export.model.checkpoint.pretrained import model_with
from nbl_export.records.plan import USUAL_KIND
from nbl_export.trust.model_settings import drop_code

__all__ = ["SIZES", "filled", "head_dim_of", "read_weights", "rope_of", "write_form", "write_weights"]

# What config.json has of the original's configuration.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "vocab_size",
         "max_position_embeddings", "tie_word_embeddings", "hidden_act", "bos_token_id", "eos_token_id",
         "pad_token_id")  # fmt: skip


def rope_of(config: Any) -> dict[str, Any]:
    """Rotary settings of transformers 4 or 5, with rope_type and rope_theta."""
    found = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    found.setdefault("rope_type", "default")
    found.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10_000.0)
    return found


def head_dim_of(config: Any) -> int:
    """Size of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def write_weights(weights: dict[str, torch.Tensor], config: Any, out: Path) -> None:
    """Write weights to a new directory, without the head if it is the embedding."""
    from huggingface_hub import save_torch_state_dict

    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    out.mkdir(parents=True)
    save_torch_state_dict(weights, out)


def write_form(settings: Mapping[str, Any], code: Path, out: Path) -> None:
    """Write config.json, which names a module of its `auto_map`, and the module. Code of others is forgotten first."""
    drop_code(out)
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    module = str(settings["auto_map"]["AutoConfig"]).partition(".")[0]
    shutil.copyfile(code, out / f"{module}.py")


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, in float32."""
    from safetensors.torch import load_file

    return {
        name: value.float()
        for file in sorted(directory.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def filled(config: Any, layers: Sequence[int], tap: str, weights: dict[str, torch.Tensor], directory: Path) -> Any:
    """The torch model of a configuration with linear layers, for parity.

    Args:
        layers: that are linear. directory: of the weights, for the message.

    Raises:
        CorruptError: a weight is missing.
    """
    model = model_with(config)
    blank = METHODS[USUAL_KIND].blank
    replace_attention(model, {i: blank(config, model.get_decoder(), None) for i in layers}, tap)
    missing = [name for name in model.state_dict() if name not in weights and name != "lm_head.weight"]
    if missing:
        raise CorruptError(f"{directory} lacks {missing[0]}, which its config.json names; convert again")
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.eval()
