"""The contract of a graph that is read by onnx_ir."""

from __future__ import annotations

import onnx_ir as ir

from nbl_export.graph.anatomy import cache_layers
from nbl_export.records.decoder import GraphContract, TensorInfo

__all__ = ["contract_of"]


def contract_of(model: ir.Model) -> GraphContract:
    """Names, element types and dimensions of a decoder graph, and the layers that keep a cache."""
    return GraphContract(
        tuple(_info(v) for v in model.graph.inputs),
        tuple(_info(v) for v in model.graph.outputs),
        cache_layers(model.graph),
    )


def _info(value: ir.Value) -> TensorInfo:
    dtype = value.dtype.numpy().name if value.dtype is not None else "?"
    dims = () if value.shape is None else tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorInfo(str(value.name), dtype, dims)
