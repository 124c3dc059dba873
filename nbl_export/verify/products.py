"""Runs the kernels of quantised products, each node by itself, on rows of +1 and -1.

    signs [R, K] ─► the node of the graph, with its codes and attributes ─► [R, N]  ==  signs W'
    token ids    ─► a lookup of the graph                                ─► [R, D]  ==  W[ids]

Signs are exact in eight bits, so a kernel that rounds activations (accuracy_level 4) has nothing to round. A code that
is off by one step shows. All nodes are in one session; weights stay in the graph's own data file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from nbl_export.errors import CorruptError
from nbl_export.graph.session import open_session

__all__ = ["ROWS", "products", "signs"]

ROWS = 8  # of signs: two columns agree, or are opposite, in all rows once in 128 times
_TOKENS = 2048  # most rows of a table that are looked up
_KINDS = ("MatMulNBits", "GatherBlockQuantized")


def signs(columns: int) -> np.ndarray:
    """Rows [R, columns] of +1 and -1, the same in every call."""
    random = np.random.default_rng(columns)
    return (2 * random.integers(0, 2, (ROWS, columns)) - 1).astype(np.float32)


def products(graph: Path, threads: int | None = None) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, input and output of every MatMulNBits and GatherBlockQuantized of a graph.

    The input is `signs` of the node's width, or token ids.

    Raises:
        CorruptError: ONNX Runtime cannot load or run the nodes.
    """
    proto = onnx.load(str(graph), load_external_data=False)
    nodes = [n for n in proto.graph.node if n.op_type in _KINDS]
    if not nodes:
        return
    probe, feeds, places = _probe(proto, nodes)
    session = open_session(probe.SerializeToString(), threads, folder=graph.parent)
    try:  # one run: ONNX Runtime computes all nodes, whichever outputs are requested
        found = session.run(None, feeds)
    except Exception as error:  # ORT's own exception types
        raise CorruptError(f"ONNX Runtime cannot run the products of {graph}: {error}") from error
    for node, place, output in zip(nodes, places, found, strict=True):
        yield node.name, feeds[place], output


def _probe(proto: Any, nodes: Sequence[Any]) -> tuple[Any, dict[str, np.ndarray], list[str]]:
    """A graph of these nodes side by side, its inputs, and the name of each node's input."""
    tensors = {t.name: t for t in proto.graph.initializer}
    makers = {name: n for n in proto.graph.node for name in n.output}
    body: dict[str, Any] = {}  # first output -> node, in execution order
    places = []

    def add(name: str) -> None:
        """Add the node that makes a stored operand: a Reshape of codes that two nodes share."""
        maker = makers.get(name)
        if maker is not None and maker.output[0] not in body:
            for given in maker.input:
                add(given)
            body[maker.output[0]] = maker

    for node in nodes:
        mine = onnx.NodeProto()
        mine.CopyFrom(node)
        index = 0 if node.op_type == "MatMulNBits" else 1
        places.append(_input_of(node, tensors))
        mine.input[index] = places[-1]
        for name in node.input[:index] + node.input[index + 1 :]:
            add(name)
        body[node.output[0]] = mine
    feeds = {place: _given(place) for place in places}
    read = {name for node in body.values() for name in node.input}
    kept = [tensor for name, tensor in tensors.items() if name in read]
    kinds = {"i": onnx.TensorProto.INT64, "f": onnx.TensorProto.FLOAT}
    infos = [onnx.helper.make_tensor_value_info(p, kinds[f.dtype.kind], f.shape) for p, f in feeds.items()]
    outputs = [onnx.helper.make_tensor_value_info(n.output[0], onnx.TensorProto.FLOAT, None) for n in nodes]
    made = onnx.helper.make_graph(list(body.values()), "products", infos, outputs, initializer=kept)
    model = onnx.helper.make_model(made, opset_imports=list(proto.opset_import), ir_version=proto.ir_version)
    return model, feeds, places


def _input_of(node: Any, tensors: dict[str, Any]) -> str:
    """Name of a node's input: signs of a width, or ids of a table with so many rows."""
    if node.op_type == "MatMulNBits":
        return f"signs.{next(a.i for a in node.attribute if a.name == 'K')}"
    return f"ids.{tensors[node.input[2]].dims[0]}"


def _given(place: str) -> np.ndarray:
    kind, size = place.split(".")
    if kind == "signs":
        return signs(int(size))
    return np.unique(np.linspace(0, int(size) - 1, min(int(size), _TOKENS)).astype(np.int64))[None]
