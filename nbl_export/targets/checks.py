"""What a target checks of its own files: what they have to be, and the judgement of the mixers that a graph holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.graph.names import constant_name, product_name
from nbl_export.methods.base import Mixer
from nbl_export.methods.predicted_kv.prompt_exit import prompt_exit_of
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.results import YES_NO, CheckResult

__all__ = [
    "MAPS",
    "PRUNED",
    "SPOKEN",
    "ExpectedGraph",
    "StoredWeights",
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
    """Check that a graph holds what the fitted mixers emit: exact if floating point, within a step if in codes."""
    emitted = {layer: _Emitted(mixer) for layer, mixer in sorted(mixers.items())}
    wanted = {product_name(layer, part) for layer, ours in emitted.items() for part in ours.matrices}
    surplus = sorted(set(held.products) - wanted)
    problems = (_problem(held, layer, ours) for layer, ours in emitted.items())
    worst = next(filter(None, problems), f"{surplus[0]} is not of the plan" if surplus else "")
    found = f"{len(mixers)} map{'' if len(mixers) == 1 else 's'} as fitted" if mixers else "none planned"
    return checked(subject, MAPS, not worst, worst or found)


def stored_maps(held: StoredWeights, mixers: Mapping[int, Mixer]) -> dict[int, dict[str, np.ndarray]]:
    """The matrices and vectors that a graph holds of each mixer, by the names that `emit` gives them."""
    found = {}
    for layer, mixer in mixers.items():
        ours = _Emitted(mixer)
        products = {part: product_name(layer, part) for part in ours.matrices}
        vectors = {part: constant_name(layer, part) for part in ours.vectors}
        found[layer] = {part: held.matrix(name)[0] for part, name in products.items() if name in held.products}
        found[layer] |= {part: held.vectors[n].astype(np.float32) for part, n in vectors.items() if n in held.vectors}
    return found


def _problem(held: StoredWeights, layer: int, ours: _Emitted) -> str:
    """How a layer's mixer in the graph differs from the fitted one; "" if it does not differ."""
    products = {product_name(layer, part): part for part in ours.matrices}
    vectors = {constant_name(layer, part): part for part in ours.vectors}
    if not products.keys() <= set(held.products):
        return f"layer {layer} has no map"
    prefix = constant_name(layer, "")
    surplus = sorted(name for name in held.vectors if name.startswith(prefix) and name not in vectors)
    if surplus:
        return f"layer {layer} has a {surplus[0].removeprefix(prefix)}"
    for name, part in vectors.items():
        if name not in held.vectors:
            return f"layer {layer} has no {part}"
        found = held.vectors[name]
        if not np.array_equal(found.ravel(), ours.vectors[part].astype(found.dtype)):
            return f"layer {layer}'s {part} is not the fitted one"
    for name, part in products.items():
        found, allowed = held.matrix(name)
        if found.shape != ours.matrices[part].shape or (np.abs(found - ours.matrices[part]) > allowed).any():
            return f"layer {layer}'s {part} is not the fitted one"
    return ""


class _Emitted:
    """The builder that only keeps the numbers that a mixer puts into a graph, by the mixer's names for them."""

    def __init__(self, mixer: Mixer) -> None:
        self.matrices: dict[str, np.ndarray] = {}
        self.vectors: dict[str, np.ndarray] = {}
        if (
            prompt_exit := prompt_exit_of({0: mixer})
        ) is not None:  # one product, put in by `methods.predicted_kv.passes`
            self.matrices = {"weight": prompt_exit.maps[0].weight}
            self.vectors = {"bias": prompt_exit.maps[0].bias}
            return
        mixer.emit(self, dict.fromkeys(read.stream for read in mixer.reads))

    def matmul(self, x: Any, matrix: np.ndarray, name: str) -> None:
        self.matrices[name] = matrix

    def add(self, x: Any, vector: np.ndarray, name: str) -> None:
        self.vectors[name] = vector
