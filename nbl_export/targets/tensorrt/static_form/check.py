"""Checks a finished graph: the order of its inputs, and everything that TensorRT would refuse or misread.

input_ids [B, T], write_indices [B], past_key_values.i.key [B, Hkv, S, head], ...value, ...
logits [B, T, V], present.i.key, present.i.value, ...
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.emitter import size

__all__ = ["CheckForm", "OrderInputs"]

_INT4_BLOCKS = (64, 128)  # TensorRT documentation, "Working with Quantized Types"
_CONTROL = ("input_ids", "write_indices")


class OrderInputs(ir.passes.InPlacePass):
    """Order the inputs: input_ids, write_indices, then the caches in their present order."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        inputs = model.graph.inputs
        controls = [v for name in _CONTROL for v in inputs if v.name == name]
        ordered = [*controls, *(v for v in inputs if v not in controls)]
        modified = [v.name for v in inputs] != [v.name for v in ordered]
        inputs[:] = ordered
        return ir.passes.PassResult(model, modified)


class CheckForm(ir.passes.InPlacePass):
    """Refuse, with a clear message, what TensorRT's parser would refuse, ignore or misread; changes nothing."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in model.graph:
            _check_node(node)
        _check_caches(model.graph)
        for value in model.graph.inputs:
            if not value.uses():
                raise RefusalError(None, f"no node reads its input {value.name}")
        return ir.passes.PassResult(model, False)


def _check_node(node: ir.Node) -> None:
    if node.domain not in ("", "ai.onnx"):
        raise RefusalError(None, f"{node.name} is {node.domain}.{node.op_type}, not a standard operator")
    if node.op_type == "DequantizeLinear":
        _check_scales(node)
    if node.op_type != "Attention":
        return
    present = [i for i, v in enumerate(node.inputs) if v is not None]
    if len(node.outputs) != 1 or present != [0, 1, 2, 3] or "is_causal" in node.attributes:
        raise RefusalError(None, f"{node.name} is not an Attention of query, keys, values and mask with one output")
    if node.attributes.get_float("scale", 0.0) != 1.0:
        raise RefusalError(None, f"{node.name} scales its keys, the whole cache; the queries alone take the scale")
    if node.attributes.get_float("softcap", 0.0):
        raise RefusalError(None, f"{node.name} soft-caps its scores, which TensorRT does not support")


def _check_scales(node: ir.Node) -> None:
    if (block := node.attributes.get_int("block_size", 0)) not in _INT4_BLOCKS:
        raise RefusalError(None, f"{node.name} has blocks of {block}, TensorRT takes {_INT4_BLOCKS}")
    scale = node.inputs[1].const_value if node.inputs[1] is not None else None
    if scale is None or not np.all(scale.numpy().astype(np.float32) > 0):
        raise RefusalError(None, f"{node.name} has a scale that is not positive, which TensorRT's parser refuses")


def _check_caches(graph: ir.Graph) -> None:
    """Each present is the past of that name with new tokens scattered in; all caches have one type and length."""
    presents = {v.name: v for v in graph.outputs}
    pasts = [v for v in graph.inputs if (v.name or "").startswith("past_key_values.")]
    for past in pasts:
        name = str(past.name).replace("past_key_values", "present")
        scatter = presents[name].producer() if name in presents else None
        if scatter is None or scatter.op_type != "TensorScatter" or scatter.inputs[0] is not past:
            raise RefusalError(None, f"{name} is not {past.name} with new tokens scattered in")
    if len({(v.dtype, size(v, 2)) for v in pasts}) != 1:
        raise RefusalError(None, "its caches differ in element type or length, or it has none")
