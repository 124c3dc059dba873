"""The methods by name. Each is a folder of this package, behind one protocol (`base.Method`)."""

from __future__ import annotations

from collections.abc import Mapping

from nbl_export.errors import NblError
from nbl_export.methods.base import Method, Mixer
from nbl_export.methods.linear.method import LINEAR
from nbl_export.methods.predicted_kv.method import PREDICTED
from nbl_export.records.plan import ATTENTION, Plan

__all__ = ["METHODS", "cache_layers", "method_of"]

METHODS: dict[str, Method] = {method.name: method for method in (LINEAR, PREDICTED)}


def cache_layers(plan: Plan) -> tuple[int, ...]:
    """Layers of a plan that hold the cache of their attention, ascending."""
    return tuple(i for i, kind in enumerate(plan.kinds) if kind == ATTENTION or METHODS[kind].holds_cache)


def method_of(maps: Mapping[int, Mixer]) -> Method:
    """The method of all maps of a model; without maps, the one that replaces nothing then.

    Raises:
        NblError: the maps are of several methods.
    """
    names = sorted({mixer.kind for mixer in maps.values()})
    if len(names) > 1:
        raise NblError(f"the maps are of several methods ({', '.join(names)}), and a model has one")
    return METHODS[names[0]] if names else LINEAR
