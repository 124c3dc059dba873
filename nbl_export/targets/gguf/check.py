"""Checks a written `deci` file against the model that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.gguf_format.content import Content, Tensor, read_content
from nbl_export.mixers.base import Mixer
from nbl_export.records.results import CheckResult
from nbl_export.targets.gguf.facts import facts_of
from nbl_export.targets.gguf.linearize import ARCHITECTURE, KEEP, with_neighbours

__all__ = ["check_file"]

# Largest error of an element, in units of the largest element of its block: half a step of the type's codes. Scales
# and offsets have 11 bits.
_STEP = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 0.5 / 127, "Q5_0": 1 / 16, "Q5_1": 1 / 31,
         "Q4_0": 1 / 8, "Q4_1": 1 / 15}  # fmt: skip
_SCALES = 2.0**-9
_BLOCK = 32


def check_file(path: Path, base: Content, maps: Mapping[int, Mixer], kind: str) -> list[CheckResult]:
    """Read a file back and compare: layers, caches, kept tensors and maps.

    Args:
        base: the original's content, as it was given to `linearized`.
    """
    found = read_content(path)
    stored, wanted = found.by_name, {t.name for t in base.tensors}
    gone = {f"blk.{i}.attn_{part}.{of}" for i in maps for part in "qkv" for of in ("weight", "bias")}
    kept = [t for t in base.tensors if t.name not in gone and t.name not in {_place(i) for i in maps}]
    results = [
        _verdict("architecture", found.architecture == ARCHITECTURE, found.architecture),
        _verdict("tensors", set(stored) == wanted - gone, f"{len(stored)} tensors"),
        _verdict("layers with a cache", facts_of(found).cache_layers == base.num_layers - len(maps),
                 f"{facts_of(found).cache_layers} of {base.num_layers}"),
        _verdict("maps in the file", not (worst := next(filter(None, (_map_problem(found, i, m.product()) for i, m in
                 sorted(maps.items()))), "")), worst or f"{len(maps)} as fitted"),
    ]  # fmt: skip
    if kind == KEEP:
        kept = [with_neighbours(t, base) for t in kept]
        other = next((t.name for t in kept if not _same(t, stored.get(t.name))), "")
        results.append(_verdict("kept tensors byte for byte", not other, other or f"{len(kept)} tensors"))
    return results


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and np.array_equal(one.read(), other.read())


def _place(layer: int) -> str:
    return f"blk.{layer}.attn_output.weight"


def _map_problem(found: Content, layer: int, matrix: Any) -> str:
    """How a layer's map in the file differs from the fitted map; "" if it does not differ."""
    tensor = found.by_name.get(_place(layer))
    if tensor is None or tensor.shape != matrix.shape:
        return f"layer {layer} has no map"
    blocks = matrix.reshape(-1, _BLOCK) if matrix.size % _BLOCK == 0 else matrix.reshape(1, -1)
    step = _STEP[tensor.kind.name]
    allowed = np.abs(blocks).max(1, keepdims=True) * (step + _SCALES * (step > 0)) + 1e-12
    if (np.abs(tensor.values().reshape(blocks.shape) - blocks) > allowed).any():
        return f"layer {layer}'s map is not the fitted one"
    return ""


def _verdict(metric: str, passed: bool, detail: str) -> CheckResult:
    return CheckResult("structure", "nbl", metric, None, None, passed, detail)
