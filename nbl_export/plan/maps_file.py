"""The maps of a plan as a safetensors file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import CorruptError
from nbl_export.records.plan import TAPS, AffineMap

__all__ = ["load_maps", "maps_in", "save_maps"]

_FORMAT = "nbl-maps-1"


def save_maps(maps: dict[int, AffineMap], path: Path, tap: str = "residual") -> None:
    """Write float32: `layers.{i}.bias` [D], and `layers.{i}.weight` [D, D] (y = x W' + b) or its factors.

    The factors of a low-rank map are `layers.{i}.up` [D, k] and `layers.{i}.down` [k, D], W = up down. The metadata
    holds format and tap in one entry: several entries have no fixed order, and equal maps must give equal bytes.
    """
    from safetensors.numpy import save_file

    tensors = {
        f"layers.{i}.{name}": np.ascontiguousarray(array)
        for i, affine in maps.items()
        for name, array in {**affine.matrices, "bias": affine.bias}.items()
    }
    save_file(tensors, path, metadata={"format": f"{_FORMAT} {tap}"})


def maps_in(path: Path) -> tuple[tuple[int, ...], str | None]:
    """Layers with a map in a maps file, ascending, and their tap (None if the file states no tap).

    Raises:
        CorruptError: the file is not a maps file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CorruptError(f"{path} is not a file; name the maps.safetensors of a run")
    try:
        with safe_open(str(path), framework="np") as file:
            names, about = list(file.keys()), file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptError(f"{path} is not a maps file ({error}); name the maps.safetensors of a run") from error
    found = [re.fullmatch(r"layers\.(\d+)\.bias", name) for name in names]
    if not any(found):
        raise CorruptError(f"{path} is not a maps file: it has no layers.N.bias; name the maps.safetensors of a run")
    tap = about.get("format", "").removeprefix(_FORMAT).strip()
    return tuple(sorted(int(m[1]) for m in found if m)), tap if tap in TAPS else None


def load_maps(path: Path, layers: Sequence[int]) -> dict[int, AffineMap]:
    """Read the maps of `layers`.

    Raises:
        CorruptError: a map is missing, has a wrong shape, or holds NaN or infinity.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as file:
            maps = {i: _load_map(file, i) for i in layers}
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptError(f"{path} is not a maps file for layers {list(layers)} ({error}); run plan again") from error
    for i, found in maps.items():
        if not (np.isfinite(found.weight).all() and np.isfinite(found.bias).all()):
            raise CorruptError(f"{path}: the map of layer {i} holds NaN or infinity; run plan again")
    return maps


def _load_map(file: Any, layer: int) -> AffineMap:
    if f"layers.{layer}.down" not in file.keys():  # noqa: SIM118  not a dict
        return AffineMap(file.get_tensor(f"layers.{layer}.weight"), file.get_tensor(f"layers.{layer}.bias"))
    return AffineMap.factored(*(file.get_tensor(f"layers.{layer}.{name}") for name in ("up", "down", "bias")))
