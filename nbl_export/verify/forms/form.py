"""What the ladder asks of a graph format: a format checks its own files, the checks on logits are the same for all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nbl_export.graph.names import constant_name, product_name, state_names
from nbl_export.mixers.base import Mixer, StateSpec
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.plan import Plan
from nbl_export.records.quantised import StoredMatrix
from nbl_export.records.results import CheckResult
from nbl_export.targets.base import Target

__all__ = [
    "MAPS",
    "Coded",
    "Form",
    "HeldMaps",
    "Material",
    "Setting",
    "checked",
    "held_names",
    "judge_maps",
    "measured_cache",
]

MAPS = "maps in the graph"  # metric of `judge_maps`


@dataclass(frozen=True)
class Material:
    """What a format checks its files with: settings, maps, rows of the token table (or None), a row of token ids."""

    setting: Setting
    maps: Mapping[int, Mixer]
    rows_VD: Any
    row: Sequence[int]
    precision: str


def held_names(cache_ids: Iterable[int], mixers: Mapping[int, Mixer] | None = None) -> set[str]:
    """Names of the inputs that a decoder holds between steps: caches, and states of layers with a short memory."""
    caches = {f"past_key_values.{i}.{part}" for i in cache_ids for part in ("key", "value")}
    return caches.union(*(state_names(layer) for layer, mixer in (mixers or {}).items() if mixer.state is not None))


class Form(Protocol):
    """Checks of one graph format."""

    def coded(
        self, setting: Setting, directories: Mapping[str, Path], results: list[CheckResult], scratch: Path
    ) -> dict[str, Coded]:
        """Return the graphs with quantised matrices by subject, with their float32 twins.

        The result is empty if no matrix is quantised. It is also empty if no twin can be made; `results` then says why.

        Args:
            scratch: directory of the twins; it must exist as long as the returned objects are used.
        """

    def check(self, subject: str, directory: Path, decoder: Any, material: Material) -> list[CheckResult]:
        """Checks structure and last_token of a directory; `decoder` runs its graph with the most logits."""

    def check_untouched(self, directories: Mapping[str, Path]) -> list[CheckResult]:
        """Check that the NBL graph has the original's weights."""


def measured_cache(subject: str, decoder: Any, head_dim: int) -> CheckResult:
    """Check structure: cache bytes that a running session holds for two sequences."""
    decoder.begin(2)
    decoder.step(np.zeros((2, 1), np.int64))
    per_token = decoder.cache_bytes // (2 * decoder.cache_length)
    stated = decoder.contract.cache_bytes_per_token(head_dim)
    detail = f"{per_token} bytes a token held after a step, {stated} by contract"
    return CheckResult(
        "structure",
        subject,
        "cache bytes in the running session",
        float(per_token != stated),
        0.5,
        per_token == stated,
        detail,
    )


@dataclass(frozen=True)
class Setting:
    """Target, decoder and plan, and how the graphs were made.

    precision: of the shipped graphs. logits: "last" or "all", of the shipped graphs. slots: most tokens of a sequence.
    nearness: most steps between codes and their matrices; None for another tool's codes. task: takes a title and
    returns a context; its value reports progress.
    """

    engine: Target
    spec: DecoderSpec
    plan: Plan
    precision: str
    logits: str
    cache_length: int
    nearness: float | None
    task: Callable[[str], AbstractContextManager[Callable[[int, int], None]]]

    @property
    def static(self) -> bool:
        """Whether graphs have the static form, see `records.capabilities.Capabilities`."""
        return self.engine.capabilities.static

    @property
    def narrow(self) -> bool:
        """Whether the engine computes in bfloat16 with caches of few bits, so that only its own arithmetic differs."""
        return self.engine.capabilities.graphs == "ir" and self.precision != "fp32"


@dataclass(frozen=True)
class Coded:
    """A graph with quantised matrices, and the float32 twin that proves its structure.

    twin: path of the float32 copy of the graph; the copy gives the logits of all tokens. open: opens a decoder of the
    twin. stored: the quantised matrices. graph: the quantised graph, whose kernels are checked; None if no CPU has
    these kernels, or if they are OpenVINO's. ships: whether the setting's decoder runs the quantised graph itself.
    """

    twin: Path
    open: Callable[[], Any]
    stored: Sequence[StoredMatrix]
    graph: Path | None
    ships: bool = True

    @property
    def source(self) -> Path:
        """The graph that the stored matrices come from."""
        return self.twin if self.graph is None else self.graph


def checked(subject: str, metric: str, passed: bool, detail: str = "") -> CheckResult:
    """A result of check structure that passes or fails."""
    return CheckResult("structure", subject, metric, 0.0 if passed else 1.0, 0.5, passed, detail)


@dataclass(frozen=True)
class HeldMaps:
    """What a graph holds of mixers.

    Attributes:
        products: names of the nodes that multiply by a matrix, without what a quantiser adds to them.
        vectors: constants that nodes add, by name.
        matrix: names of a product and of its constant -> the matrix, and the allowed error of each element.
    """

    products: Collection[str]
    vectors: Mapping[str, np.ndarray]
    matrix: Callable[[str, str], tuple[np.ndarray, np.ndarray | float]]


def judge_maps(
    subject: str, held: HeldMaps, mixers: Mapping[int, Mixer], tabulated: int = 0, table_problem: str = ""
) -> CheckResult:
    """Check that a graph holds what the fitted mixers emit: exact if floating point, within a step if in codes.

    Args:
        tabulated: number of first layers that a table of tokens covers.
        table_problem: how the table differs from the output of these layers; "" if it does not differ.
    """
    emitted = {layer: _Emitted(mixer) for layer, mixer in sorted(mixers.items()) if layer >= tabulated}
    wanted = {product_name(layer, part) for layer, ours in emitted.items() for part in ours.matrices}
    surplus = sorted(set(held.products) - wanted)
    problems = [table_problem, *(_problem(held, layer, ours) for layer, ours in emitted.items())]
    worst = next(filter(None, problems), f"{surplus[0]} is not of the plan" if surplus else "")
    detail = f"{len(mixers) - tabulated} map{'' if len(mixers) - tabulated == 1 else 's'} as fitted"
    detail += f", a table for the first {tabulated}" if tabulated else ""
    return checked(subject, MAPS, not worst, worst or detail)


def _problem(held: HeldMaps, layer: int, ours: _Emitted) -> str:
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
        found, allowed = held.matrix(name, constant_name(layer, part))
        if found.shape != ours.matrices[part].shape or (np.abs(found - ours.matrices[part]) > allowed).any():
            return f"layer {layer}'s {part} is not the fitted one"
    return ""


class _Emitted:
    """The builder that only keeps the numbers that a mixer puts into a graph, by the mixer's names for them."""

    def __init__(self, mixer: Mixer) -> None:
        self.matrices: dict[str, np.ndarray] = {}
        self.vectors: dict[str, np.ndarray] = {}
        mixer.emit(self, None)

    def matmul(self, x: Any, matrix: np.ndarray, name: str) -> None:
        self.matrices[name] = matrix

    def add(self, x: Any, other: Any, name: str) -> None:
        if isinstance(other, np.ndarray):
            self.vectors[name] = other

    def concat(self, values: Sequence[Any], name: str) -> None:
        pass

    def slice(self, x: Any, start: int, end: int | None, name: str) -> None:
        pass

    def state(self, spec: StateSpec, name: str) -> None:
        pass

    def keep(self, spec: StateSpec, value: Any, name: str) -> None:
        pass
