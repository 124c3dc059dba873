"""Scores and a goal -> which layers are replaced."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import CorruptError, NblError
from nbl_export.records import TAPS, AffineMap, LayerScore, Plan

__all__ = ["choose", "load_maps", "maps_in", "parse_layers", "ranked", "save_maps"]

_FORMAT = "nbl-maps-1"


def parse_layers(text: str | None, num_layers: int) -> int | tuple[int, ...]:
    """Read `--layers`: "8" is a count, "0,7,24-29" (or "8,") names layers from 0; None is a quarter.

    Raises:
        NblError: not a number, repeated, running backwards, a layer that this model does not have, or every layer.
    """
    if text is None:
        return max(0, min(round(num_layers / 4), num_layers - 1))
    text = text.strip()
    if _is_number(text):
        count = int(text)
        if count >= num_layers:
            raise NblError(_all_refused(f"--layers {count}", num_layers))
        return count
    chosen: list[int] = []
    for part in (p.strip() for p in text.rstrip(",").split(",")):
        first, dash, last = part.partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            raise NblError(
                f"--layers {text!r}: {part!r} is not a layer or a range; write a count (8) or layers from 0 (0,7,24-29)"
            )
        low, high = int(first), int(last) if dash else int(first)
        if high < low:
            raise NblError(f"--layers {text!r}: the range {part} runs backwards")
        if high >= num_layers:
            raise NblError(
                f"--layers {text!r}: layer {high} does not exist; this model has layers 0 to {num_layers - 1}"
            )
        chosen.extend(range(low, high + 1))
    repeated = sorted({i for i in chosen if chosen.count(i) > 1})
    if repeated:
        raise NblError(f"--layers {text!r}: layer {repeated[0]} is named twice")
    if len(chosen) >= num_layers:
        raise NblError(_all_refused(f"--layers {text!r}", num_layers))
    return tuple(sorted(chosen))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _all_refused(what: str, num_layers: int) -> str:
    return (
        f"{what} would replace all {num_layers} attention layers; at least one stays, because without any "
        "no token could see another: ask for at most " + str(num_layers - 1)
    )


def ranked(scores: Sequence[LayerScore], select: str) -> tuple[int, ...]:
    """All layers, cheapest first by a score of their own: "cca" or "error"; the lower layer on a tie."""
    key = {"cca": "bound", "error": "relative_error"}[select]
    return tuple(s.layer for s in sorted(scores, key=lambda s: (getattr(s, key), s.layer)))


def choose(
    scores: Sequence[LayerScore], request: int | tuple[int, ...], tap: str = "residual", select: str = "cca",
    order: Sequence[int] | None = None,
) -> Plan:  # fmt: skip
    """The plan for a count (the first of `order`, which is `ranked` if none is given) or for named layers."""
    if isinstance(request, int):
        order = ranked(scores, select) if order is None else order
        replaced = tuple(sorted(order[:request]))
    else:
        replaced, select = request, "given"
    return Plan(len(scores), replaced, tap, select, tuple(scores))


def save_maps(maps: dict[int, AffineMap], path: Path, tap: str = "residual") -> None:
    """Write float32: `layers.{i}.bias` [D], and `layers.{i}.weight` [D, D] (y = x W' + b) or its factors.

    The factors of a map of low rank are `layers.{i}.up` [D, k] and `layers.{i}.down` [k, D], W = up down. The metadata
    has the tap, in one entry: several are written in any order, and equal maps are to be equal bytes.
    """
    from safetensors.numpy import save_file

    tensors = {
        f"layers.{i}.{name}": np.ascontiguousarray(array)
        for i, affine in maps.items()
        for name, array in {**affine.matrices, "bias": affine.bias}.items()
    }
    save_file(tensors, path, metadata={"format": f"{_FORMAT} {tap}"})


def maps_in(path: Path) -> tuple[tuple[int, ...], str | None]:
    """Layers that a maps file has maps of, ascending, and their tap (None: an older file, that does not say).

    Raises:
        CorruptError: it is no maps file.
    """
    from safetensors import SafetensorError, safe_open

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
