"""The last positions of a chunk, as a verifier of drafted tokens reads them: gathered, and padded to the old shape.

    before   x [B, T, D] ----------------------- head -> logits [B, T, V]
    after    x -- Slice(last R) -> [B, min(R, T), D] -- head -- Pad -> logits [B, T, V]

A runtime of speculative decoding reads one position behind a prompt, and up to R positions behind drafted tokens. It
sizes its buffer for all T positions, so the positions before the last R are zeros. A chunk of at most R tokens has no
zeros. Rows with padding behind their tokens are wrong here; runtimes verify one sequence at a time.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nbl_export.rewrite.tail.emitter import Emitter

__all__ = ["LastRows"]

_PREFIX = "/nbl/rows"  # begins the names of all nodes of this file


class LastRows:
    """Takes the last rows of values [B, T, ...] of a graph; for `tail.PruneTail`."""

    def __init__(self, graph: ir.Graph, rows: int) -> None:
        self.index: list[ir.Node] = []  # nodes that `take` needs: none
        self._emit, self._graph = Emitter(graph, _PREFIX, "nbl.rows"), graph
        self._bounds = [
            self._emit.constant("start", [-rows]),  # a Slice starts at 0 if the chunk is shorter
            self._emit.constant("end", [np.iinfo(np.int64).max]),
            self._emit.constant("axis", [1]),
        ]

    def take(self, value: ir.Value, name: str) -> ir.Node:
        """A node that takes the last rows of a value; it is not in the graph yet."""
        node = ir.node("Slice", [value, *self._bounds], name=f"{_PREFIX}/{name}")
        node.outputs[0].name = f"{_PREFIX}/{name}/output_0"
        node.outputs[0].type = value.type
        return node

    def finish(self, logits: ir.Value) -> None:
        """Pad the graph's logits in front, so that they have a row for each token again."""
        graph, name, shape = self._graph, logits.name, logits.shape
        ids = next(v for v in graph.inputs if v.name == "input_ids")
        logits.name, logits.shape = f"{_PREFIX}/logits", None
        width = self._emit("Shape", "width", ids, start=1, end=2)
        computed = self._emit("Shape", "computed", logits, start=1, end=2)
        front = self._emit("Sub", "front", width, computed)
        none, none_behind = self._emit.constant("none", [0]), self._emit.constant("none_behind", [0, 0, 0, 0])
        pads = self._emit("Concat", "pads", none, front, none_behind, axis=0)
        padded = self._emit("Pad", "padded", logits, pads)
        padded.name, padded.type, padded.shape = name, logits.type, shape
        producer = logits.producer()
        assert producer is not None
        graph.insert_after(producer, self._emit.nodes)
        graph.outputs[list(graph.outputs).index(logits)] = padded
