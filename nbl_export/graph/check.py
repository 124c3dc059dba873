"""Runs ONNX's own checker on decoder graphs from exporters."""

from __future__ import annotations

from typing import Any

import onnx

__all__ = ["check_structure", "skeleton"]


def check_structure(bare: Any) -> str:
    """Run the ONNX checker: order of nodes, types of attributes, lengths of tensors.

    Args:
        bare: a `skeleton`.

    Returns:
        The first problem; "" if there is none.
    """
    try:
        onnx.checker.check_model(bare)
    except Exception as error:  # checker and protobuf raise several types
        return next(iter(str(error).splitlines()), "") or type(error).__name__
    return ""


def skeleton(proto: Any) -> Any:
    """Copy of a graph without its external data (declared as inputs), in a form that the checker accepts.

    The GenAI builder emits SimplifiedLayerNormalization in the default domain, where ONNX Runtime registers it. The
    ONNX checker does not know it there. The copy has it in the contrib domain, which the checker does not check.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    inside = []
    for tensor in bare.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            bare.graph.input.append(info)
        else:
            inside.append(tensor)
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(inside)
    for node in bare.graph.node:
        if node.op_type == "SimplifiedLayerNormalization" and not node.domain:
            node.domain = "com.microsoft"
    return bare
