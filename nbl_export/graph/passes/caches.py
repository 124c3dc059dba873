"""Drops and numbers the caches of a decoder graph.

The caches that no layer holds go, and the kept ones are numbered densely where a runtime asks for that:

    before   inputs past.0 past.1 past.2 / outputs present.0 present.1 present.2      (1 replaced)
    after    inputs past.0 past.2        / outputs present.0 present.2
    dense    inputs past.0 past.1        / outputs present.0 present.1

Some exporters read the past length of all layers from one layer's cache (`Shape(past_key_values.0.key)`). These readers
first get a kept cache, which has the same dimensions. Refuses a cache that any other node still reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import graph_caches
from nbl_export.graph.files import read_graph

__all__ = ["DropCaches", "RenumberCaches", "make_dense"]


def make_dense(path: Path) -> None:
    """Give a saved graph cache ids 0..K-1; its data file does not change."""
    model = read_graph(path)
    RenumberCaches()(model)
    ir.save(model, path)


class DropCaches(ir.passes.InPlacePass):
    """Remove the caches of the given layers, and what only they needed; run after `RewriteBlocks`."""

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__()
        self.layers = tuple(layers)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        caches = graph_caches(model.graph)
        kept = next((pasts for layer, (pasts, _) in caches.items() if layer not in self.layers), None)
        if kept is None:
            raise RefusalError(None, "no attention layer would keep its cache; keep at least one")
        for pasts, presents in (caches[layer] for layer in self.layers):
            for past, replacement in zip(pasts, kept, strict=True):
                _repoint_shape_readers(past, replacement)
            for present in presents:
                graph.outputs.remove(present)
        RemoveUnusedNodesPass()(model)
        for layer in self.layers:
            for past in caches[layer][0]:
                if readers := past.consumers():
                    reader = readers[0].name or readers[0].op_type
                    raise RefusalError(layer, f"its cache {past.name} is still read by {reader}")
                graph.inputs.remove(past)
        return ir.passes.PassResult(model, modified=bool(self.layers))


def _repoint_shape_readers(past: ir.Value, replacement: ir.Value) -> None:
    for user, index in tuple(past.uses()):
        if user.op_type in ("Shape", "Size"):
            user.replace_input_with(index, replacement)


class RenumberCaches(ir.passes.InPlacePass):
    """Rename caches to ids 0..K-1, in the order of their layers; run last. The manifest has the layer of each id.

    TensorRT binds caches by name and accepts any ids. The code around TensorRT (ONNX Runtime's RTX provider, samples,
    this project's contract) counts 0..K-1. Refuses a cache without its other three tensors, and a name that another
    value has.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        names: dict[ir.Value, str] = {}
        for index, (layer, (pasts, presents)) in enumerate(graph_caches(model.graph).items()):
            for value in (*pasts, *presents):
                if str(value.name).count(".") != 2:
                    raise RefusalError(layer, f"its cache is called {value.name}, which cannot be renumbered")
                stem, _, part = str(value.name).split(".")
                names[value] = f"{stem}.{index}.{part}"
        values = ir.convenience.create_value_mapping(model.graph)
        for name in names.values():
            if name in values and values[name] not in names:
                raise RefusalError(None, f"the name {name} is needed for a cache and taken by another value")
        modified = any(value.name != name for value, name in names.items())
        ir.convenience.rename_values(list(names), list(names.values()))
        return ir.passes.PassResult(model, modified)
