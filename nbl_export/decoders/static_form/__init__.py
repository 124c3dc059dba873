"""The static form of a decoder: standard operators on caches of fixed length, as TensorRT takes it.

    mobius' static-cache graph ─► caches by head ─► positions ─► masks ─► rotary tables ─► law      the form, float32
                                                            the form ─► fp16 | bf16 ─► int4 ─► law      what ships

Passes add nodes at the end of the graph; one topological sort puts them in order, so none cares where it stands.
Their own order matters: the masks are found by the new cache names and made from the positions. All logits are there
up to the end; `rewrite.last_token` cuts them, for graphs of every source.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from nbl_export.decoders.static_form.floats import CastFloats
from nbl_export.decoders.static_form.head_major import HeadMajorCaches
from nbl_export.decoders.static_form.int4 import BlockInt4
from nbl_export.decoders.static_form.law import CheckForm, OrderInputs
from nbl_export.decoders.static_form.masks import ExplicitMasks
from nbl_export.decoders.static_form.positions import DerivedPositions
from nbl_export.decoders.static_form.rotary import TrimRotaryTables

__all__ = ["PRECISIONS", "finish_passes", "form_passes"]

PRECISIONS = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "int4": ir.DataType.FLOAT16,  # of everything that is not int4
}


def form_passes(slots: int, windows: Sequence[int | None]) -> Sequence[ir.passes.PassBase]:
    """mobius' static-cache graph in float32 -> the static form in float32, logits of all positions."""
    return (
        HeadMajorCaches(),
        DerivedPositions(),
        ExplicitMasks(windows),
        TrimRotaryTables(slots),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
        OrderInputs(),
        CheckForm(),
    )


def finish_passes(precision: str) -> Sequence[ir.passes.PassBase]:
    """The float32 form -> the same at a precision. fp32 changes nothing."""
    return (
        CastFloats(PRECISIONS[precision]),
        *([BlockInt4()] if precision == "int4" else []),  # the scales are rounded before the codes are chosen
        common.TopologicalSortPass(),
        OrderInputs(),
        CheckForm(),
    )
