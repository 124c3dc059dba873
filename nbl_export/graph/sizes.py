"""The size of a decoder graph, without its weights: parameters, and cache bytes of a token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import CorruptError, MissingPackageError
from nbl_export.records.decoder import ITEMSIZE, is_state

__all__ = ["GraphFacts", "read_graph_facts"]

# Rotary tables, as both builders name them; no weights.
_APART = ("cos_cache", "sin_cache")
_PACKED = {  # operator -> its inputs with codes, scales and zero points; their matrix is counted separately
    "MatMulNBits": slice(1, 4),
    "GatherBlockQuantized": slice(0, 1),
    "DequantizeLinear": slice(1, 3),
}


@dataclass(frozen=True)
class GraphFacts:
    """The size of a decoder graph.

    Attributes:
        parameters: elements of all weights; a shared weight counts once.
        cache_bytes_per_token: of one sequence.
    """

    parameters: int
    cache_bytes_per_token: int


def read_graph_facts(path: Path, head_dim: int) -> GraphFacts:
    """Read model.onnx alone; its external data may be absent.

    Args:
        head_dim: size of a head, used if the graph only names that dimension of its caches.

    Raises:
        CorruptError: the file is no ONNX graph.
        MissingPackageError: onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingPackageError("onnx", "cpu", "reading the graph") from error
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's own exception types
        raise CorruptError(f"{path} cannot be read ({error or type(error).__name__}); export it again") from error
    kinds = {code: {"FLOAT": "float32"}.get(name, name.lower()) for name, code in onnx.TensorProto.DataType.items()}
    return GraphFacts(_parameters(graph, kinds), _cache_bytes(graph, kinds, head_dim))


def _parameters(graph: Any, kinds: dict[int, str]) -> int:
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    floats = {tensor.name for tensor in graph.initializer if "float" in kinds[tensor.data_type]}
    counted = {name: sizes[name] for name in floats if not name.endswith(_APART)}
    for node in graph.node:
        own = {a.name: a.i for a in node.attribute}
        packed = list(node.input)[_PACKED.get(node.op_type, slice(0, 0))]
        for name in packed:
            counted.pop(name, None)
        if node.op_type == "MatMulNBits":
            counted[packed[0]] = own["K"] * own["N"]
        elif node.op_type == "GatherBlockQuantized":
            counted[packed[0]] = _unpacked(graph, packed[0], sizes, own.get("bits", 4), kinds)
            for name in list(node.input)[2:]:
                counted.pop(name, None)
        elif node.op_type == "DequantizeLinear" and node.input[0] in sizes:
            counted[node.input[0]] = sizes[node.input[0]]
    return sum(counted.values())


def _unpacked(graph: Any, name: str, sizes: dict[str, int], bits: int, kinds: dict[int, str]) -> int:
    kind = next((kinds[t.data_type] for t in graph.initializer if t.name == name), "")
    return sizes.get(name, 0) * (8 // bits if kind in ("uint8", "int8") else 1)


def _cache_bytes(graph: Any, kinds: dict[int, str], head_dim: int) -> int:
    total = 0
    for value in graph.input:
        if value.name.startswith("past_key_values.") and not is_state(value.name):
            tensor = value.type.tensor_type
            dims = [d.dim_value for d in tensor.shape.dim]
            total += dims[1] * (dims[3] or head_dim) * ITEMSIZE.get(kinds[tensor.elem_type], 4)
    return total
