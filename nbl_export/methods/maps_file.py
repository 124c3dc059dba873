"""The mixers of a plan as a safetensors file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import CorruptError
from nbl_export.methods import METHODS
from nbl_export.methods.base import Mixer
from nbl_export.records.plan import TAPS, USUAL_KIND

__all__ = ["load_maps", "maps_in", "save_maps"]

_FORMAT = "nbl-maps-1"
_MOST_ELEMENTS = 8  # of a tensor, in squares of the decoder's width; Gemma 7B predicts KV by 5.4
_TYPES = ("F32", "F16")
_TENSOR = re.compile(r"layers\.(\d{1,9})\.(?:(\w+)\.)?(\w+)")


def save_maps(maps: Mapping[int, Mixer], path: Path, tap: str = "residual") -> None:
    """Write float32. A linear layer: `layers.{i}.bias` [D] and `layers.{i}.weight` [D, D].

    Other kinds have their name before that of a tensor: `layers.{i}.{kind}.{name}`. The metadata holds format and tap
    in one entry: several entries have no fixed order, and equal maps must give equal bytes.
    """
    from safetensors.numpy import save_file

    tensors = {
        f"layers.{i}.{'' if mixer.kind == USUAL_KIND else f'{mixer.kind}.'}{name}": np.ascontiguousarray(array)
        for i, mixer in maps.items()
        for name, array in mixer.tensors().items()
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
            names = list(file.keys())
            about = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptError(f"{path} is not a maps file ({error}); name the maps.safetensors of a run") from error
    found = [match for name in names if (match := _TENSOR.fullmatch(name)) and (match[2] or match[3] == "bias")]
    if not found:
        raise CorruptError(f"{path} is not a maps file: it has no layers.N.bias; name the maps.safetensors of a run")
    tap = about.get("format", "").removeprefix(_FORMAT).strip()
    return tuple(sorted({int(m[1]) for m in found})), tap if tap in TAPS else None


def load_maps(path: Path, layers: Sequence[int], width: int | None = None) -> dict[int, Mixer]:
    """Read the maps of `layers`.

    Args:
        width: of the decoder, with which shapes are compared before a tensor is read; None if it is not known.

    Raises:
        CorruptError: a map is missing, has a wrong shape or width, or holds NaN or infinity.
    """
    from safetensors import SafetensorError, safe_open

    maps = {}
    try:
        with safe_open(str(path), framework="np") as file:
            matches = [match for name in file.keys() if (match := _TENSOR.fullmatch(name))]  # noqa: SIM118
            for i in layers:
                ours = {match[3]: match for match in matches if int(match[1]) == i}
                method = METHODS[next((match[2] for match in ours.values() if match[2]), USUAL_KIND)]
                maps[i] = method.from_tensors(_Stored(file, i, {name: match[0] for name, match in ours.items()}, width))
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, OverflowError) as error:
        raise CorruptError(f"{path} is not a maps file for layers {list(layers)} ({error}); run plan again") from error
    for i, found in maps.items():
        if width and found.size != width:
            raise CorruptError(f"{path}: the map of layer {i} is for a width of {found.size}, the decoder's is {width}")
        if not all(np.isfinite(array).all() for array in found.tensors().values()):
            raise CorruptError(f"{path}: the map of layer {i} holds NaN or infinity; run plan again")
    return maps


class _Stored(dict[str, np.ndarray]):
    """The tensors of a layer that its kind asks for; shapes are compared with the decoder before a tensor is read."""

    def __init__(self, file: Any, layer: int, names: Mapping[str, str], width: int | None) -> None:
        super().__init__()
        self._file = file
        self._layer = layer
        self._names = names
        self._width = width

    def __missing__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(f"there is no layers.{self._layer}.{name}")
        stored = self._file.get_slice(self._names[name])
        if stored.get_dtype() not in _TYPES:
            raise ValueError(f"{self._names[name]} is in {stored.get_dtype()}, and maps are in {' or '.join(_TYPES)}")
        shape = stored.get_shape()
        if self._width and math.prod(shape) > _MOST_ELEMENTS * self._width**2:
            raise ValueError(f"{self._names[name]} has shape {shape}, and the decoder is {self._width} wide")
        value: np.ndarray = self._file.get_tensor(self._names[name])
        return value
