"""A decoder graph with attention outputs that the caller gives as inputs.

    x --norm-- attention -- y [override] -- join      outputs x (or norm(x)) beside the existing outputs

`anatomy` finds the layers, as for the rewrite. Weights stay in the graph's files, which ONNX Runtime reads itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import AttentionBlock, find_block
from nbl_export.graph.caches import present_names
from nbl_export.graph.emitter import element_type
from nbl_export.graph.files import load_graph
from nbl_export.mixers.base import tapped

__all__ = ["TappedGraph", "overriding_graph"]


@dataclass(frozen=True)
class TappedGraph:
    """A graph in memory, with its external data in `directory`.

    Attributes:
        caches: name of each cache input -> of its output, as `graph.decoder.OnnxDecoder` takes them.
        taps: tap -> layer -> output.
        attention: layer -> output.
        override: layer -> input that replaces the attention output.
    """

    proto: bytes
    directory: Path
    caches: dict[str, str]
    taps: dict[str, dict[int, str]]
    attention: dict[int, str]
    override: dict[int, str]


def overriding_graph(file: Path, layers: Sequence[int], tap: str) -> TappedGraph:
    """Take the attention output of `layers` from new inputs [B, T, D], and show the input of their maps.

    Raises:
        RefusalError: a layer is not understood, or has no normed input and the tap "normed" is asked for.
    """
    model = load_graph(file)
    graph, caches = model.graph, present_names(model.graph)
    blocks = [find_block(graph, layer) for layer in layers]
    named = {tap: {block.layer: _show(graph, tapped(block, tap)) for block in blocks}}
    override = {block.layer: _take(graph, block) for block in blocks}
    return TappedGraph(_bytes(model), file.parent, caches, named, {}, override)


def _show(graph: ir.Graph, value: ir.Value) -> str:
    if not value.is_graph_output():
        value.type = value.type or ir.TensorType(element_type(graph, value))
        graph.outputs.append(value)
    return str(value.name)


def _take(graph: ir.Graph, block: AttentionBlock) -> str:
    dtype = element_type(graph, block.branch)
    name = f"nbl.override.{block.layer}"
    value = ir.Value(name=name, shape=ir.Shape(["B", "T", "D"]), type=ir.TensorType(dtype))
    graph.inputs.append(value)
    block.join.replace_input_with(block.branch_index, value)
    return name


def _bytes(model: ir.Model) -> bytes:
    try:
        return bytes(ir.to_proto(model).SerializeToString())
    except ValueError as error:  # weights inside the file exceed protobuf's 2 GiB
        raise RefusalError(None, f"it is too large for one message; save it with external data ({error})") from error
