"""Configuration of an NBL model in the form of Nemotron-NAS; written by nbl-export beside the weights.

Readers take `block_configs[i].attention.replace_with_linear` and so on as attributes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import PretrainedConfig

__all__ = ["NblNasConfig"]


class NblNasConfig(PretrainedConfig):
    """A Llama's configuration with one record a layer."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **values: Any) -> None:
        super().__init__(**values)
        self.block_configs = [_record(block) for block in block_configs]

    def to_dict(self) -> dict[str, Any]:
        """All values as JSON values."""
        found: dict[str, Any] = super().to_dict()
        found["block_configs"] = [_plain(block) for block in self.block_configs]
        return found


def _record(value: Any) -> Any:
    return SimpleNamespace(**{k: _record(v) for k, v in value.items()}) if isinstance(value, dict) else value


def _plain(value: Any) -> Any:
    return {k: _plain(v) for k, v in vars(value).items()} if isinstance(value, SimpleNamespace) else value
