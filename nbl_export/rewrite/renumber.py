"""Gives caches dense ids, for runtimes that count caches from 0 without a gap.

    before   past_key_values.0, .2, .5  -> present.0, .2, .5        (layers 1, 3, 4 replaced)
    after    past_key_values.0, .1, .2  -> present.0, .1, .2        nbl.cache_layers = "0,2,5"

TensorRT binds caches by name and accepts any ids. The code around TensorRT (ONNX Runtime's RTX provider, samples, this
project's contract) counts 0..K-1. The model's metadata keeps the layer of each id. Refuses a cache without its other
three tensors, and a name that another value has.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import graph_caches

__all__ = ["LAYERS_KEY", "RenumberCaches"]

LAYERS_KEY = "nbl.cache_layers"


class RenumberCaches(ir.passes.InPlacePass):
    """Rename caches to ids 0..K-1, in the order of their layers; run last.

    After a call, `new_ids` maps each kept layer to its id, and `renamed` lists (name, layer, id) of each tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.new_ids: dict[int, int] = {}
        self.renamed: tuple[tuple[str, int, int], ...] = ()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        caches = graph_caches(model.graph)
        before = _recorded(model, list(caches))
        self.new_ids = {before[layer]: index for index, layer in enumerate(caches)}
        plan = list(_plan(caches))
        _refuse_taken(model.graph, [(value, name) for value, name, _, _ in plan])
        changed = [value.name != name for value, name, _, _ in plan]
        for value, name, _, _ in plan:
            value.name = name
        model.metadata_props[LAYERS_KEY] = ",".join(map(str, self.new_ids))
        self.renamed = tuple((name, before[layer], index) for _, name, layer, index in plan)
        return ir.passes.PassResult(model, modified=any(changed))


def _recorded(model: ir.Model, ids: list[int]) -> dict[int, int]:
    """Layer of each id that the graph has now; the metadata of a renumbered graph states the layers."""
    stated = model.metadata_props.get(LAYERS_KEY)
    layers = [int(part) for part in stated.split(",")] if stated else []
    return {i: layers[i] if i < len(layers) else i for i in ids}


def _plan(
    caches: dict[int, tuple[tuple[ir.Value, ...], tuple[ir.Value, ...]]],
) -> Iterator[tuple[ir.Value, str, int, int]]:
    """Value, new name, old id and new id of every cache tensor."""
    for index, (layer, (pasts, presents)) in enumerate(caches.items()):
        for value in (*pasts, *presents):
            if str(value.name).count(".") != 2:
                raise RefusalError(layer, f"its cache is called {value.name}, which cannot be renumbered")
            stem, _, part = str(value.name).split(".")
            yield value, f"{stem}.{index}.{part}", layer, index


def _refuse_taken(graph: ir.Graph, names: list[tuple[ir.Value, str]]) -> None:
    """Refuse a new name that a value other than a cache already has."""
    ours = {id(value) for value, _ in names}
    wanted = {name for _, name in names}
    others = [*graph.inputs, *graph.initializers.values(), *(o for n in graph for o in n.outputs)]
    for value in others:
        if value.name in wanted and id(value) not in ours:
            raise RefusalError(None, f"the name {value.name} is needed for a cache and taken by another value")
