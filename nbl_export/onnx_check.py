"""ONNX's own checker, for decoder graphs as exporters really make them."""

from __future__ import annotations

from typing import Any

import onnx

__all__ = ["check_structure", "skeleton"]


def check_structure(bare: Any) -> str:
    """What the checker finds: nodes out of order, attributes without a type, tensors that are not as long as stated.

    Args:
        bare: a `skeleton`.

    Returns:
        the first problem, "" where there is none.
    """
    try:
        onnx.checker.check_model(bare)
    except Exception as error:  # checker and protobuf raise several kinds
        return next(iter(str(error).splitlines()), "") or type(error).__name__
    return ""


def skeleton(proto: Any) -> Any:
    """The graph without its external data (declared as inputs), as the checker can take it.

    SimplifiedLayerNormalization is registered by ONNX Runtime in the default domain, where the ONNX checker does
    not know it (the GenAI builder emits it); it is moved to the contrib domain, which the checker leaves alone.
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
