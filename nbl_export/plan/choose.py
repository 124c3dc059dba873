"""Chooses the replaced layers from scores and a request."""

from __future__ import annotations

from collections.abc import Sequence

from nbl_export.errors import NblError
from nbl_export.records.goals import read_layers
from nbl_export.records.plan import LayerScore, Plan

__all__ = ["a_quarter", "choose", "parse_layers", "ranked"]


def a_quarter(num_layers: int) -> int:
    """How many layers are replaced by default if the model's own output cannot judge them: at least one of several."""
    return min(max(1, round(num_layers / 4)), num_layers - 1)


def parse_layers(text: str, num_layers: int, flag: str = "--layers") -> int | tuple[int, ...]:
    """Read `--layers`, or another flag: "8" is a count, "0,7,24-29" (or "8,") names layers from 0.

    Raises:
        UsageError: a part is no number, or a range runs backwards.
        NblError: a layer is repeated or missing, or every layer is named.
    """
    asked = read_layers(text, flag)
    if isinstance(asked, int):
        if asked >= num_layers:
            raise NblError(_all_refused(f"{flag} {asked}", num_layers))
        return asked
    chosen: list[int] = []
    for low, high in asked:
        if high >= num_layers:
            raise NblError(f"{flag} {text!r}: layer {high} does not exist; this model has layers 0 to {num_layers - 1}")
        chosen.extend(range(low, high + 1))
    repeated = sorted({i for i in chosen if chosen.count(i) > 1})
    if repeated:
        raise NblError(f"{flag} {text!r}: layer {repeated[0]} is named twice")
    if len(chosen) >= num_layers:
        raise NblError(_all_refused(f"{flag} {text!r}", num_layers))
    return tuple(sorted(chosen))


def _all_refused(what: str, num_layers: int) -> str:
    return (
        f"{what} would replace all {num_layers} attention layers; at least one stays, because without attention "
        "no token sees another: ask for at most " + str(num_layers - 1)
    )


def ranked(scores: Sequence[LayerScore], select: str) -> tuple[int, ...]:
    """All layers, smallest score first ("cca": bound, "error": relative error); the lower layer first on a tie."""
    key = {"cca": "bound", "error": "relative_error"}[select]
    return tuple(s.layer for s in sorted(scores, key=lambda s: (getattr(s, key), s.layer)))


def choose(
    scores: Sequence[LayerScore], request: int | tuple[int, ...], tap: str = "residual", select: str = "cca",
    order: Sequence[int] | None = None,
) -> Plan:  # fmt: skip
    """The plan for a count or for named layers. A count takes the first layers of `order` (default: `ranked`)."""
    if isinstance(request, int):
        order = ranked(scores, select) if order is None else order
        replaced = tuple(sorted(order[:request]))
    else:
        replaced, select = request, "given"
    return Plan(len(scores), replaced, tap, select, tuple(scores))
