"""A decoder graph in which mixers take the place of attention, computed in NumPy between parts of the graph.

    input_ids ─► part 0 ─► x and tap of layer i ─► mixer of i ─► y ─► part 1 ─► x and tap of layer j ─► ... ─► logits
                 caches of layers below i                             caches of layers from i to j

The graph is split at the joins of the replaced layers (`anatomy`), and no pass of the rewrite is used. A part reads the
stream x that enters its layer, the mixer's output y, and inputs of the graph. Nodes that only a replaced attention
needs are in no part. Each part is a session of ONNX Runtime, which reads its weights from the graph's own files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from nbl_export.graph.anatomy import find_block
from nbl_export.graph.emitter import ancestors, element_type
from nbl_export.graph.files import load_graph
from nbl_export.graph.session import open_session, returning_memory
from nbl_export.methods.base import tapped

__all__ = ["MixedSession"]

_STOP_SPINNING = {"session.force_spinning_stop": "1"}  # threads of a part that waits take no time from the next part


class MixedSession:
    """Runs like an `InferenceSession` of the graph, without the caches of replaced layers.

    Args:
        file: the graph, with the logits of all tokens.
        tap: the input of the mixers.
        fp32_activations: see `open_session`.
        shown: layers whose input stream is one more output.

    Attributes:
        streams: the names of these outputs, by layer.

    Raises:
        RefusalError: a layer is not understood, or has no such tap.
        CorruptError: ONNX Runtime cannot load a part.
    """

    def __init__(
        self,
        file: Path,
        mixers: Mapping[int, Any],
        tap: str,
        *,
        fp32_activations: bool = False,
        shown: Sequence[int] = (),
    ) -> None:
        model = load_graph(file)
        graph = model.graph
        self._mixers = mixers
        blocks = [find_block(graph, layer) for layer in sorted(mixers)]
        streams = [block.residual for block in blocks]
        taps = [tapped(block, tap) for block in blocks]
        dropped = {value for block in blocks for value in block.presents}
        outputs = {layer: find_block(graph, layer).residual for layer in shown}
        self.streams = {layer: str(value.name) for layer, value in outputs.items()}
        wanted = [*streams, *taps, *outputs.values(), *(value for value in graph.outputs if value not in dropped)]
        for value in (*streams, *taps, *outputs.values()):
            value.type = value.type or ir.TensorType(element_type(graph, value))
        given = []
        for block in blocks:
            own = ir.Value(name=f"nbl.mixed.{block.layer}", type=block.residual.type, shape=ir.Shape(["B", "T", "D"]))
            graph.inputs.append(own)
            block.join.replace_input_with(block.branch_index, own)
            given.append(own)
        self._between = [(i, str(x.name), str(y.name)) for i, x, y in zip(sorted(mixers), taps, given, strict=True)]
        self._parts = [
            open_session(
                part, folder=file.parent, entries=_STOP_SPINNING, mapped=True, fp32_activations=fp32_activations
            )
            for part in _parts(model, list(zip(streams, given, strict=True)), taps, list(dict.fromkeys(wanted)))
        ]
        self._returning = returning_memory()
        inner = {str(value.name) for value in (*streams, *taps, *given, *outputs.values())}
        self._inputs, self._outputs = (
            list({value.name: value for values in every for value in values if value.name not in hidden}.values())
            for every, hidden in (
                ([part.get_inputs() for part in self._parts], inner),
                ([part.get_outputs() for part in self._parts], inner - set(self.streams.values())),
            )
        )

    def get_inputs(self) -> list[Any]:
        """Inputs of the graph that a part reads."""
        return self._inputs

    def get_outputs(self) -> list[Any]:
        """Logits, caches of the layers that are not replaced, and streams."""
        return self._outputs

    def run(self, outputs: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run the parts in order, and behind each part the mixer of the next part's layer."""
        known = dict(feeds)
        for place, part in enumerate(self._parts):
            if place:
                layer, x, y = self._between[place - 1]
                known[y] = self._mixers[layer](known[x]).astype(known[x].dtype)
            names = [value.name for value in part.get_outputs()]
            read = {value.name: known[value.name] for value in part.get_inputs()}
            known.update(zip(names, part.run(names, read, self._returning), strict=True))
        return [known[name] for name in outputs]


def _parts(
    model: ir.Model, boundaries: Sequence[Collection[ir.Value]], taps: Sequence[ir.Value], wanted: Sequence[ir.Value]
) -> Iterator[bytes]:
    """The part before the first boundary, and the parts behind each boundary, which read the values of the boundary.

    Args:
        taps: of each boundary, computed before it; the first norm of a graph reads the stream of its boundary.
        wanted: each of these values is an output of the first part that can compute it from the boundaries.
    """
    place = {value: number for number, boundary in enumerate(boundaries, start=1) for value in boundary}
    inputs: list[dict[ir.Value, None]] = [{} for _ in range(len(boundaries) + 1)]
    outputs: list[dict[ir.Value, None]] = [{} for _ in inputs]
    before = {tap: number for number, tap in enumerate(taps, start=1)}
    for value in wanted:
        stops = {v: number for v, number in place.items() if number < before.get(value, len(boundaries) + 1)}
        read = _read(value, stops)
        own = max((stops[v] for v in read if v in stops), default=0)
        inputs[own].update(dict.fromkeys(read))
        outputs[own][value] = None
    for given, made in zip(inputs, outputs, strict=True):
        part = ir.Model(
            ir.convenience.extract(model.graph, list(given), list(made)),
            ir_version=model.ir_version,
            functions=list(model.functions.values()),
        )
        yield ir.to_proto(part).SerializeToString()


def _read(value: ir.Value, stops: Collection[ir.Value]) -> list[ir.Value]:
    """Inputs of the graph and stops that a value is computed from; the search ends at stops."""
    found = ancestors(value, stops)
    inputs = [here for here in found if here.is_graph_input() and here.producer() is None]
    return [here for here in found if here in inputs or (here in stops and here is not value)]
