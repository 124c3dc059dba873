"""Take the key/value caches of replaced layers out of the graph's inputs and outputs.

    before   inputs past.0 past.1 past.2 / outputs present.0 present.1 present.2      (1 replaced)
    after    inputs past.0 past.2        / outputs present.0 present.2

Some exporters read the past length off one layer's cache for all (`Shape(past_key_values.0.key)`): such readers
are pointed at a kept cache first, which has the same dimensions. Refuses a cache that anything else still reads.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence

import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.rewrite.anatomy import graph_caches

__all__ = ["DropCaches", "DropUnreadCaches"]


class DropCaches(ir.passes.InPlacePass):
    """Remove the caches of the given layers; run after `BypassAttention`, before `Sweep`."""

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.pasts: list[tuple[int, ir.Value]] = []  # layer and input of what is to go

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        caches = graph_caches(graph)
        kept = [layer for layer in caches if layer not in self.layers]
        if not kept:
            raise RefusalError(None, "no attention layer would keep its cache; at least one stays")
        for layer in self.layers:
            pasts, presents = caches[layer]
            for past, replacement in zip(pasts, caches[kept[0]][0], strict=True):
                _repoint_shape_readers(past, replacement)
                self.pasts.append((layer, past))
            _remove(graph.outputs, presents)
        return ir.passes.PassResult(model, modified=bool(self.layers))


class DropUnreadCaches(ir.passes.InPlacePass):
    """Remove the cache inputs of what `DropCaches` has dropped, which nobody reads any more; run after `Sweep`."""

    def __init__(self, dropped: DropCaches) -> None:
        super().__init__()
        self.dropped = dropped

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for layer, value in self.dropped.pasts:
            readers = [user.name or user.op_type for user in value.consumers()]
            if readers:
                raise RefusalError(layer, f"its cache {value.name} is still read by {readers[0]}")
        _remove(model.graph.inputs, [value for _, value in self.dropped.pasts])
        return ir.passes.PassResult(model, modified=bool(self.dropped.pasts))


def _repoint_shape_readers(past: ir.Value, replacement: ir.Value) -> None:
    for user, index in tuple(past.uses()):
        if user.op_type in ("Shape", "Size"):
            user.replace_input_with(index, replacement)


def _remove(values: MutableSequence[ir.Value], gone: Sequence[ir.Value]) -> None:
    for value in gone:
        values.remove(value)
