"""Chooses the replaced layers from scores and a request."""

from __future__ import annotations

from collections.abc import Sequence

from nbl_export.records.plan import LayerScore, Plan

__all__ = ["a_quarter", "choose", "ranked"]


def a_quarter(num_layers: int) -> int:
    """How many layers are replaced by default if the model's own output cannot judge them: at least one of several."""
    return min(max(1, round(num_layers / 4)), num_layers - 1)


def ranked(scores: Sequence[LayerScore], select: str) -> tuple[int, ...]:
    """All layers, smallest score first ("cca": bound, "error": relative error); the lower layer first on a tie."""
    key = {"cca": "bound", "error": "relative_error"}[select]
    return tuple(s.layer for s in sorted(scores, key=lambda s: (getattr(s, key), s.layer)))


def choose(
    scores: Sequence[LayerScore], request: int | tuple[int, ...], tap: str = "residual", select: str = "cca",
    order: Sequence[int] | None = None, kind: str = "linear",
) -> Plan:  # fmt: skip
    """The plan for a count or for named layers, all of one kind.

    A count takes the first layers of `order` (default: `ranked`).
    """
    if isinstance(request, int):
        order = ranked(scores, select) if order is None else order
        replaced = tuple(sorted(order[:request]))
    else:
        replaced, select = request, "given"
    return Plan(len(scores), replaced, tap, select, tuple(scores), (kind,) * len(replaced))
