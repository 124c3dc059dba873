"""What planning reads. Building these inputs loads neither torch nor a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from nbl_export.methods.base import Mixer
from nbl_export.records.inputs import Lazy
from nbl_export.records.plan import USUAL_KIND
from nbl_export.text.parts import Texts

__all__ = ["AskedGoal", "MapKind", "OrderInputs", "PlanInputs"]

Maps = Mapping[int, Mixer]  # replaced layer -> its mixer
Task = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]  # title -> progress (done, total)


@dataclass(frozen=True)
class MapKind:
    """How the mixer of a layer is made from its moments.

    kind: its name in `nbl_export.methods`. bias: whether maps have one.
    """

    kind: str = USUAL_KIND
    tap: str = "residual"
    bias: bool = True


@dataclass(frozen=True)
class OrderInputs:
    """What the order of replacement follows from.

    Attributes:
        select: "cca" (smallest bound) or "efficient" (least loss for the work saved).
        moments: (layer, tap) -> its moments.
        partial: maps and their tap -> the torch model, in which these maps can replace attention.
        texts: texts that layers are chosen by; no map is fitted on them.
        saved: share of the arithmetic of a prefill of some tokens that maps save.
        kept: layers that no order replaces.
    """

    kind: MapKind
    num_layers: int
    select: str
    moments: Lazy[Callable[[int, str], Any]]
    partial: Lazy[Callable[[Maps, str], Any]]
    texts: Lazy[Texts]
    saved: Lazy[Callable[[Maps, int], float]]
    kept: tuple[int, ...] = ()


@dataclass(frozen=True)
class AskedGoal:
    """Most relative increase of perplexity, and the option's text; None for the default limit."""

    share: float
    text: str | None


@dataclass(frozen=True)
class PlanInputs:
    """What a plan follows from.

    Attributes:
        fit: the source of the maps. request: how many or which layers are replaced; None leaves the number to the goal.
        trains: whether maps are trained, so that a limit on quality is tested on trained maps.
        validation: texts on which a limit on quality is tested.
        speedup: modelled speed-ups of some maps ("prefill" and "decode"). setting: what they are modelled for.
    """

    fit: str
    order: OrderInputs
    request: int | tuple[int, ...] | None
    goal: AskedGoal
    trains: Lazy[bool]
    validation: Lazy[Texts]
    speedup: Lazy[Callable[[Maps], Any]]
    setting: Lazy[Mapping[str, Any]]
