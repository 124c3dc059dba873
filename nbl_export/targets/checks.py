"""What a target checks of its own files: what they have to be, and the judgement of the mixers that a graph holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from nbl_export.graph.names import constant_name, product_name
from nbl_export.methods.base import Mixer, Stored, changed
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.results import YES_NO, CheckResult

__all__ = [
    "MAPS",
    "PRUNED",
    "SPOKEN",
    "ExpectedGraph",
    "StoredWeights",
    "apart",
    "check_cache",
    "checked",
    "judge_maps",
    "stored_maps",
]

MAPS = "maps in the graph"  # metric of `judge_maps`
PRUNED = "what ships is the graph with all logits, pruned"  # metric
SPOKEN = {"last": "of the last token", "all": "of all tokens"}  # logits


@dataclass(frozen=True)
class ExpectedGraph:
    """What a directory's graph has to be.

    Attributes:
        subject: "original" or "nbl".
        logits: "last" or "all", of the graph that ships.
        cache_layers: layers with keys and values.
        maps: of the replaced layers; empty for the original.
    """

    subject: str
    spec: DecoderSpec
    precision: str
    logits: str
    cache_layers: tuple[int, ...]
    maps: Mapping[int, Mixer]


def checked(subject: str, metric: str, passed: bool, detail: str = "") -> CheckResult:
    """A result of check structure that passes or fails."""
    return CheckResult("structure", subject, metric, 0.0 if passed else 1.0, YES_NO, passed, detail)


def check_cache(wanted: ExpectedGraph, stated: int, itemsize: int) -> CheckResult:
    """Compare the bytes that a graph's caches take for a token with those of the planned layers.

    Args:
        itemsize: bytes of an element.
    """
    planned = wanted.spec.cache_bytes_per_token(len(wanted.cache_layers), itemsize)
    detail = f"{stated} bytes a token, {planned} predicted"
    return checked(wanted.subject, "cache bytes per token", stated == planned, detail)


@dataclass(frozen=True)
class StoredWeights:
    """What a graph holds of mixers.

    Attributes:
        products: names of the nodes that multiply by a matrix, without what a quantiser adds to them.
        vectors: constants that nodes add, and weights of norms, by name.
        matrix: name of a product -> its matrix, and the allowed error of each element.
    """

    products: Collection[str]
    vectors: Mapping[str, np.ndarray]
    matrix: Callable[[str], tuple[np.ndarray, np.ndarray | float]]


def judge_maps(subject: str, held: StoredWeights, mixers: Mapping[int, Mixer]) -> CheckResult:
    """Check that a graph holds what the fitted mixers store: exact if floating point, within a step if in codes."""
    stored = {layer: mixer.stored() for layer, mixer in sorted(mixers.items())}
    wanted = {product_name(layer, part) for layer, (matrices, _) in stored.items() for part in matrices}
    surplus = sorted(set(held.products) - wanted)
    problems = (_problem(held, layer, *ours) for layer, ours in stored.items())
    worst = next(filter(None, problems), f"{surplus[0]} is not of the plan" if surplus else "")
    found = f"{len(mixers)} map{'' if len(mixers) == 1 else 's'} as fitted" if mixers else "none planned"
    return checked(subject, MAPS, not worst, worst or found)


def stored_maps(held: StoredWeights, mixers: Mapping[int, Mixer]) -> dict[int, Mixer]:
    """Mixers with the matrices and vectors that a graph holds, in place of the fitted ones."""
    found = {}
    for layer, mixer in mixers.items():
        matrices, vectors = mixer.stored()
        products = {part: product_name(layer, part) for part in matrices}
        constants = {part: constant_name(layer, part) for part in vectors}
        ours = {part: held.matrix(name)[0] for part, name in products.items() if name in held.products}
        ours |= {part: held.vectors[n].astype(np.float32) for part, n in constants.items() if n in held.vectors}
        fitted = {**matrices, **vectors}
        ours = {
            part: array.reshape(fitted[part].shape) for part, array in ours.items() if array.size == fitted[part].size
        }
        found[layer] = changed(mixer, ours)
    return found


def _problem(held: StoredWeights, layer: int, matrices: Stored, vectors: Stored) -> str:
    """How a layer's mixer in the graph differs from the fitted one; "" if it does not differ."""
    products = {product_name(layer, part): part for part in matrices}
    constants = {constant_name(layer, part): part for part in vectors}
    if not products.keys() <= set(held.products):
        return f"layer {layer} has no map"
    prefix = constant_name(layer, "")
    surplus = sorted(name for name in held.vectors if name.startswith(prefix) and name not in constants)
    if surplus:
        return f"layer {layer} has a {surplus[0].removeprefix(prefix)}"
    for name, part in constants.items():
        if name not in held.vectors:
            return f"layer {layer} has no {part}"
        found = held.vectors[name]
        if not np.array_equal(found.ravel(), vectors[part].astype(found.dtype)):
            return f"layer {layer}'s {part} is not the fitted one"
    for name, part in products.items():
        found, allowed = held.matrix(name)
        if found.shape != matrices[part].shape or (np.abs(found - matrices[part]) > allowed).any():
            return f"layer {layer}'s {part} is not the fitted one"
    return ""


def apart(right: np.ndarray, found: np.ndarray) -> float:
    """The rms of the difference of logits over the rms of the right ones, [V] or [positions, V].

    Positions that neither has computed are left out; NaN if one alone has computed a position.
    """
    computed = ~np.isnan(right).all(-1)
    if (np.isnan(found).all(-1) == computed).any():
        return float("nan")
    right = right[computed]
    found = found[computed]
    away = found.astype(np.float64) - right
    return float(np.sqrt(np.square(away).mean() / np.square(right, dtype=np.float64).mean()))
