"""Scales of groups as a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from nbl_export.errors import CorruptError

__all__ = ["load_scales", "save_scales"]


def save_scales(scales: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write the scales [C] of groups, by the group's name."""
    from safetensors.torch import save_file

    save_file({name: scale.contiguous() for name, scale in scales.items()}, path, metadata={"format": "nbl-scales-1"})


def load_scales(path: Path) -> dict[str, torch.Tensor]:
    """Read the scales.

    Raises:
        CorruptError: the file cannot be read, or a scale is not positive.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        scales: dict[str, torch.Tensor] = load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptError(f"{path} cannot be read ({error}); delete it to have it made again") from error
    if not all(bool((scale > 0).all()) for scale in scales.values()):
        raise CorruptError(f"{path} holds a scale that is not positive; delete it to have it made again")
    return scales
