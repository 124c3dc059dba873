"""The mixers of a plan as a safetensors file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nbl_export.errors import CorruptError
from nbl_export.mixers import kind_of
from nbl_export.mixers.base import Mixer
from nbl_export.records.plan import TAPS

__all__ = ["load_maps", "maps_in", "save_maps"]

_FORMAT = "nbl-maps-1"
_UNNAMED = "linear"  # the kind whose tensors do not name it
_TENSOR = re.compile(r"layers\.(\d+)\.(?:(\w+)\.)?(\w+)")


def save_maps(maps: Mapping[int, Mixer], path: Path, tap: str = "residual") -> None:
    """Write float32. A linear layer: `layers.{i}.bias` [D] and `layers.{i}.weight` [D, D].

    Other kinds have their name before that of a tensor: `layers.{i}.{kind}.{name}`. The metadata holds format and tap
    in one entry: several entries have no fixed order, and equal maps must give equal bytes.
    """
    from safetensors.numpy import save_file

    tensors = {
        f"layers.{i}.{'' if mixer.kind == _UNNAMED else f'{mixer.kind}.'}{name}": np.ascontiguousarray(array)
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
            names, about = list(file.keys()), file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptError(f"{path} is not a maps file ({error}); name the maps.safetensors of a run") from error
    found = [match for name in names if (match := _TENSOR.fullmatch(name)) and (match[2] or match[3] == "bias")]
    if not found:
        raise CorruptError(f"{path} is not a maps file: it has no layers.N.bias; name the maps.safetensors of a run")
    tap = about.get("format", "").removeprefix(_FORMAT).strip()
    return tuple(sorted({int(m[1]) for m in found})), tap if tap in TAPS else None


def load_maps(path: Path, layers: Sequence[int]) -> dict[int, Mixer]:
    """Read the maps of `layers`.

    Raises:
        CorruptError: a map is missing, has a wrong shape, or holds NaN or infinity.
    """
    from safetensors import SafetensorError, safe_open

    maps = {}
    try:
        with safe_open(str(path), framework="np") as file:
            matches = [match for name in file.keys() if (match := _TENSOR.fullmatch(name))]  # noqa: SIM118
            for i in layers:
                ours = [match for match in matches if int(match[1]) == i]
                kind = kind_of(next((match[2] for match in ours if match[2]), _UNNAMED))
                maps[i] = kind.from_tensors(_Named(i, {match[3]: file.get_tensor(match[0]) for match in ours}))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CorruptError(f"{path} is not a maps file for layers {list(layers)} ({error}); run plan again") from error
    for i, found in maps.items():
        if not all(np.isfinite(array).all() for array in found.tensors().values()):
            raise CorruptError(f"{path}: the map of layer {i} holds NaN or infinity; run plan again")
    return maps


class _Named(dict[str, np.ndarray]):
    """The tensors of a layer, whose lack of one is told by the name in the file."""

    def __init__(self, layer: int, tensors: Mapping[str, np.ndarray]) -> None:
        super().__init__(tensors)
        self._layer = layer

    def __missing__(self, name: str) -> np.ndarray:
        raise KeyError(f"there is no layers.{self._layer}.{name}")
