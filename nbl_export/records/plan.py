"""Which layers have mixers, of which method, and how the layers were scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbl_export.records.from_json import require

__all__ = ["ATTENTION", "MAPS", "PREDICTED_KV", "TAPS", "USUAL_KIND", "LayerScore", "Plan", "describe_layers"]


@dataclass(frozen=True)
class LayerScore:
    """How well a mixer can replace a layer's attention (method: Erdogan et al. 2025).

    Attributes:
        bound: sum_i (1 - rho_i^2) over the canonical correlations of input and residual output (CCA); smaller is
            better. This bound on the residual output's NMSE is loose: up to the hidden size. For SmolLM2 the bound is
            11 to 99, and no NMSE is above 1. So the bound serves only to rank layers.
        nmse: exact calibration error of the attention output, tr(Cyy - W Cxy) / tr(Cyy).
        relative_error: the same error relative to the residual output, tr(Cyy - W Cxy) / tr(C++).
    """

    layer: int
    bound: float
    nmse: float
    relative_error: float


def describe_layers(layers: Sequence[int]) -> str:
    """Sorted layers as the command line takes them: 0, 7, 24-29."""
    starts = [i for i in layers if i - 1 not in layers]
    ends = [i for i in layers if i + 1 not in layers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


# Input of a map. residual: the residual stream before the layer's norm, as in the paper's reference code. normed: the
# layer's normed input, well conditioned, and expected by engines that know linear-replaced attention.
TAPS = ("residual", "normed")


# affine: x W' + b, the method as published. linear: x W' of the normed input, for formats that store no bias.
MAPS = ("affine", "linear")


ATTENTION = "attention"  # the kind of a layer that stays as it is
USUAL_KIND = "linear"  # method of a replaced layer that names none
PREDICTED_KV = "predicted_kv"  # method of layers above an exit layer, whose attention stays


@dataclass(frozen=True)
class Plan:
    """The method of each layer. A plan of attention alone means the original model.

    Attributes:
        kinds: of each layer, the name of a method (`nbl_export.methods`) or `ATTENTION`.
    """

    kinds: tuple[str, ...]
    tap: str = "residual"
    select: str = "cca"
    scores: tuple[LayerScore, ...] = ()

    def __post_init__(self) -> None:
        require(ATTENTION in self.kinds, "at least one attention layer stays")
        require(self.tap in TAPS, f"unknown tap {self.tap!r}; taps are {', '.join(TAPS)}")

    @classmethod
    def of(
        cls,
        num_layers: int,
        kinds: Mapping[int, str],
        tap: str = "residual",
        select: str = "cca",
        scores: tuple[LayerScore, ...] = (),
    ) -> Plan:
        """The plan of a decoder in which some layers have these kinds."""
        require(set(kinds) <= set(range(num_layers)), "a layer with a kind does not exist")
        return cls(tuple(kinds.get(i, ATTENTION) for i in range(num_layers)), tap, select, scores)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Plan:
        """The plan that the facts of a manifest record."""
        scores = tuple(LayerScore(**score) for score in facts["scores"])
        kinds = dict(zip(facts["replaced_layers"], facts["kinds"], strict=True))
        return cls.of(facts["num_layers"], kinds, facts["tap"], facts["select"], scores)

    @property
    def predicts(self) -> bool:
        """Whether prompts stop at an exit layer (`methods.predicted_kv.maps`)."""
        return PREDICTED_KV in self.kinds

    @property
    def num_layers(self) -> int:
        return len(self.kinds)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with a mixer, ascending."""
        return tuple(i for i, kind in enumerate(self.kinds) if kind != ATTENTION)

    @property
    def mixers(self) -> tuple[str, ...]:
        """The kinds of `layers`."""
        return tuple(kind for kind in self.kinds if kind != ATTENTION)
