"""What the verification ladder has proven, and to what accuracy, in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nbl_export.records.results import COMPARED, FAILED, RungResult
from nbl_export.verify.codes import (
    DISTANCE,
    NEARNESS,
    PRODUCTS,
    TWIN,
)

__all__ = ["proof"]


def proof(rungs: Sequence[RungResult], reference: str, status: str) -> list[str]:
    """One sentence for each proven fact; a single sentence if a rung failed.

    Args:
        rungs: of both graphs, in the order of the ladder.
        reference: what the graphs are compared with, in words.
        status: see `records.results.status_of`.
    """
    if status == FAILED:
        return ["Nothing is proven: a rung of the ladder failed."]
    limits = [_NOT_PROVEN] if status == COMPARED else []
    return [said for said in (*limits, _wiring(rungs, reference), *_codes(rungs), _shipped(rungs)) if said]


_NOT_PROVEN = (
    "This quantised graph was compared, but its wiring is not proven: no float32 twin was checked, and a fault smaller "
    "than the allowed difference does not show."
)


def _worst(rungs: Iterable[RungResult]) -> RungResult | None:
    return max((r for r in rungs if r.value is not None), key=lambda r: r.value or 0.0, default=None)


def _wiring(rungs: Sequence[RungResult], reference: str) -> str:
    """The sentence of rung c."""
    compared = [r for r in rungs if r.rung == "c" and "logit" in r.metric]
    exact = _worst(r for r in compared if r.metric.startswith("max abs"))
    coded = any(r.metric == PRODUCTS for r in rungs)
    longest = next((r.detail.split(";")[0] for r in compared if "tokens in chunks" in r.detail), "")
    how = "prefill and cached steps, alone and as a batch" + (f", and {longest}" if longest else "")
    if exact is not None:
        what = "the float32 twin of the NBL graph" if coded else "the NBL graph"
        return f"{what[0].upper()}{what[1:]} and {reference} differ by at most {exact.value:.1e} in any logit ({how})."
    coarse = _worst(compared)
    if coarse is None:
        return ""
    return (
        f"The NBL graph and {reference} differ by {coarse.value:.1%} of the size of the logits ({how}); "
        f"an error below {coarse.tolerance:.1%} would pass."
    )


def _codes(rungs: Sequence[RungResult]) -> list[str]:
    said = [f"Float32 twin: {r.detail}." for r in rungs if r.metric == TWIN]
    near, kernels = _worst(r for r in rungs if r.metric == NEARNESS), _worst(r for r in rungs if r.metric == PRODUCTS)
    if near is not None:
        from_elsewhere = "" if near.tolerance is not None else "; its codes came from another tool"
        said.append(f"Every quantised matrix lies within {near.value:.2f} steps of the model's{from_elsewhere}.")
    if kernels is not None:
        said.append(
            f"Every quantised product multiplies by its codes, to {kernels.value:.0e} of the sum of their magnitudes."
        )
    return said


def _shipped(rungs: Sequence[RungResult]) -> str:
    ships = _worst(r for r in rungs if r.rung == "g" and r.metric != DISTANCE)
    before = _worst(r for r in rungs if r.metric == DISTANCE)
    if ships is None or before is None:
        return ""
    return (
        f"The shipped graph differs from this reference by {ships.value:.1%} of the size of the logits, because it "
        f"rounds activations; rounding the matrices moved the logits by {before.value:.0%}."
    )
