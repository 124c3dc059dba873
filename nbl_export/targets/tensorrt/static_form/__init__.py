"""The static form of a decoder: standard operators on caches of fixed length, as TensorRT accepts it.

    mobius' static-cache graph ─► caches by head ─► query scale ─► positions ─► masks ─► rotary tables ─► check
                                                     the form, float32 ─► fp16 | bf16 ─► int4 ─► check    what ships

Passes add nodes at the end of the graph; one topological sort orders the nodes. The order of the passes matters: the
mask pass needs the new cache names and the positions. The form gives all logits; `graph.passes.tail` prunes them,
for graphs of every source.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from nbl_export.targets.tensorrt.static_form.attention import (
    DerivedPositions,
    ExplicitMasks,
    HeadMajorCaches,
    TrimRotaryTables,
)
from nbl_export.targets.tensorrt.static_form.check import CheckForm, OrderInputs
from nbl_export.targets.tensorrt.static_form.numbers import BlockInt4, CastFloats, ScaledQueries

__all__ = ["PRECISIONS", "finish_passes", "form_passes"]

PRECISIONS = {
    "fp32": ir.DataType.FLOAT,
    "bf16": ir.DataType.BFLOAT16,
    "fp16": ir.DataType.FLOAT16,
    "int4": ir.DataType.FLOAT16,  # for everything but the int4 matrices
}


def form_passes(cache_length: int, windows: Sequence[int | None]) -> Sequence[ir.passes.PassBase]:
    """Passes from mobius' static-cache graph to the static form, both in float32 with all logits."""
    return (
        HeadMajorCaches(),
        ScaledQueries(),
        DerivedPositions(),
        ExplicitMasks(windows),
        TrimRotaryTables(cache_length),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
        OrderInputs(),
        CheckForm(),
    )


def finish_passes(precision: str) -> Sequence[ir.passes.PassBase]:
    """Passes from the float32 form to the form at a precision; fp32 changes nothing."""
    return (
        CastFloats(PRECISIONS[precision]),
        *([BlockInt4()] if precision == "int4" else []),  # after the cast: codes are chosen for rounded scales
        common.TopologicalSortPass(),
        OrderInputs(),
        CheckForm(),
    )
