"""Removes the key/value caches of replaced layers from the graph's inputs and outputs.

    before   inputs past.0 past.1 past.2 / outputs present.0 present.1 present.2      (1 replaced)
    after    inputs past.0 past.2        / outputs present.0 present.2

Some exporters read the past length of all layers from one layer's cache (`Shape(past_key_values.0.key)`). These readers
first get a kept cache, which has the same dimensions. Refuses a cache that any other node still reads.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence

import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import graph_caches

__all__ = ["DropCaches", "DropUnreadCaches"]

_DROPPED = "nbl_export.dropped"  # metadata key of a cache input; its value is the layer


class DropCaches(ir.passes.InPlacePass):
    """Remove the caches of the given layers; run after `BypassAttention`, before `Sweep`."""

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__()
        self.layers = tuple(layers)

    def requires(self, model: ir.Model) -> None:
        """At least one layer keeps its cache."""
        if not set(graph_caches(model.graph)) - set(self.layers):
            raise RefusalError(None, "no attention layer would keep its cache; keep at least one")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        caches = graph_caches(graph)
        kept = [layer for layer in caches if layer not in self.layers]
        for layer in self.layers:
            pasts, presents = caches[layer]
            for past, replacement in zip(pasts, caches[kept[0]][0], strict=True):
                _repoint_shape_readers(past, replacement)
                past.meta[_DROPPED] = layer
            _remove(graph.outputs, presents)
        return ir.passes.PassResult(model, modified=bool(self.layers))


class DropUnreadCaches(ir.passes.InPlacePass):
    """Remove the cache inputs that `DropCaches` has marked; run after `Sweep`."""

    def requires(self, model: ir.Model) -> None:
        """No node reads a dropped cache."""
        for value in _dropped(model.graph):
            readers = [user.name or user.op_type for user in value.consumers()]
            if readers:
                raise RefusalError(value.meta[_DROPPED], f"its cache {value.name} is still read by {readers[0]}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        gone = _dropped(model.graph)
        _remove(model.graph.inputs, gone)
        return ir.passes.PassResult(model, modified=bool(gone))


def _dropped(graph: ir.Graph) -> list[ir.Value]:
    return [value for value in graph.inputs if _DROPPED in value.meta]


def _repoint_shape_readers(past: ir.Value, replacement: ir.Value) -> None:
    for user, index in tuple(past.uses()):
        if user.op_type in ("Shape", "Size"):
            user.replace_input_with(index, replacement)


def _remove(values: MutableSequence[ir.Value], gone: Sequence[ir.Value]) -> None:
    for value in gone:
        values.remove(value)
