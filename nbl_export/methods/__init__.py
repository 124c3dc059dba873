"""What a layer does with the sequence: a protocol (`base`), one file a kind, and the kinds by name."""

from __future__ import annotations

from nbl_export.methods.base import Kind
from nbl_export.methods.linear.maps import LINEAR
from nbl_export.methods.linear.none import NONE
from nbl_export.methods.predicted_kv.maps import PREDICTED
from nbl_export.records.plan import ATTENTION, Plan

__all__ = ["cache_layers", "kind_of", "kinds", "register"]

_KINDS: dict[str, Kind] = {kind.name: kind for kind in (LINEAR, NONE, PREDICTED)}


def register(kind: Kind) -> None:
    """Add a kind by its name."""
    _KINDS[kind.name] = kind


def kinds() -> tuple[str, ...]:
    """Names of all kinds."""
    return tuple(_KINDS)


def cache_layers(plan: Plan) -> tuple[int, ...]:
    """Layers of a plan that hold the cache of their attention, ascending."""
    return tuple(i for i, kind in enumerate(plan.kinds) if kind == ATTENTION or kind_of(kind).holds_cache)


def kind_of(name: str) -> Kind:
    """The kind of this name.

    Raises:
        KeyError: there is no such kind.
    """
    return _KINDS[name]
