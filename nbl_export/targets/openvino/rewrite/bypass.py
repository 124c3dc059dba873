"""Feeds a replaced layer's residual join with x W' + b instead of its attention, in an IR.

    before   x -- norm -- qkv -- states -- attention -- o_proj -+      after   x -- MatMul(W') -- Add(b) -+
             x ------------------------------------------------ join           x -------------------- join

A map of low rank is two products, and one without a bias has no Add. The old block loses its reader and is not saved
(see `drop_states`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nbl_export.errors import RefusalError
from nbl_export.records.plan import AffineMap
from nbl_export.targets.openvino.ir.anatomy import Block, Dataflow

__all__ = ["bypass_attention", "product_name"]

_PRODUCTS = {"weight": "MatMul", "down": "MatMulDown", "up": "MatMulUp"}  # as `rewrite.bypass` names them


def product_name(layer: int, part: str) -> str:
    """Name of the node that multiplies by a map's matrix."""
    return f"/nbl/layers.{layer}/{_PRODUCTS[part]}"


def bypass_attention(flow: Dataflow, maps: Mapping[int, AffineMap], tap: str) -> None:
    """Replace the attention of the mapped layers by affine maps, in place.

    Raises:
        RefusalError: a block is not understood, has another width, or lacks the tap.
    """
    for block in [flow.block(layer) for layer in sorted(maps)]:
        _check_width(block, maps[block.layer])
        value = _mapped(block.layer, _tapped(block, tap), maps[block.layer])
        block.join.input(block.branch).replace_source_output(value)


def _tapped(block: Block, tap: str) -> Any:
    if tap == "residual":
        return block.residual
    if block.normed is None:
        raise RefusalError(
            block.layer,
            "its attention does not multiply one normed value first, which tap normed needs; use tap residual",
        )
    return block.normed


def _check_width(block: Block, affine: AffineMap) -> None:
    width = block.join.get_output_partial_shape(0)[-1]
    if width.is_static and width.get_length() != len(affine.bias):
        raise RefusalError(
            block.layer, f"its attention output is {width.get_length()} wide, the map {len(affine.bias)}"
        )


def _mapped(layer: int, value: Any, affine: AffineMap) -> Any:
    """The output x W' + b; matrices are stored as [outputs, inputs]."""
    from openvino import opset13 as ops

    for part, matrix in affine.matrices.items():
        name = product_name(layer, part)
        weight = ops.constant(np.ascontiguousarray(matrix, np.float32), name=f"nbl.layers.{layer}.{part}")
        value = ops.matmul(value, weight, False, True, name=name).output(0)
    if not affine.has_bias:
        return value
    bias = ops.constant(affine.bias.astype(np.float32).reshape(1, 1, -1), name=f"nbl.layers.{layer}.bias")
    return ops.add(value, bias, name=f"/nbl/layers.{layer}/Add").output(0)
