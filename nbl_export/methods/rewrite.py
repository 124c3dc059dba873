"""Turns a decoder graph and mixers into the NBL graph: an ordered list of passes, one subject each.

Passes change the graph in place and report whether they did. A pass refuses what it does not understand, with layer and
reason. Mixers of m layers of which fewer could be rewritten are an error.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import graph_caches
from nbl_export.graph.emitter import run_passes
from nbl_export.graph.files import read_graph
from nbl_export.graph.names import ALL_LOGITS_FILE, STATIC_GRAPH_FILE, all_logits_file, goes_with_graph, graph_file
from nbl_export.graph.passes.caches import DropCaches, make_dense
from nbl_export.graph.passes.quantize import QuantizeMaps
from nbl_export.graph.passes.skip_norms import SkipNormToAdd
from nbl_export.graph.passes.tail import keep_last_token
from nbl_export.methods import method_of
from nbl_export.methods.base import Mixer, cacheless
from nbl_export.records.plan import describe_layers

__all__ = ["passes_for", "rewrite", "rewrite_model"]


def passes_for(maps: Mapping[int, Mixer], tap: str = "residual") -> Sequence[ir.passes.PassBase]:
    """The passes of the rewrite, in order."""
    return (
        *method_of(maps).passes(maps, tap),
        DropCaches(cacheless(maps)),
        SkipNormToAdd(),
        QuantizeMaps(),
        RemoveUnusedNodesPass(),
    )


def rewrite_model(model: ir.Model, maps: Mapping[int, Mixer], tap: str = "residual") -> None:
    """Rewrite a model in place; no maps change nothing.

    Args:
        maps: layer -> its mixer. tap: what mixers act on (`records.plan.TAPS`).

    Raises:
        RefusalError: the graph is not understood, or lacks one of the layers.
    """
    if not maps:
        return
    before = graph_caches(model.graph)
    missing = set(maps) - set(before)
    if missing:
        left = describe_layers(list(before))
        raise RefusalError(min(missing), f"it has no attention, so it is replaced already; layers {left} have some")
    gone = cacheless(maps)
    run_passes(passes_for(maps, tap), model)
    after = [value for pasts, _ in graph_caches(model.graph).values() for value in pasts]
    if after != [value for layer in before if layer not in gone for value in before[layer][0]]:
        names = [value.name for value in after]
        raise RefusalError(None, f"caches {names} remain, where those of layers {describe_layers(gone)} should be gone")


def rewrite(source: Path, out: Path, maps: Mapping[int, Mixer], tap: str = "residual") -> None:
    """Write the NBL version of a deployable directory to `out`, which must not exist.

    Kept weights are copied from file to file. No maps copy the graph byte for byte. A decoder.onnx gets dense
    cache ids; a model.onnx keeps the ids of its layers. Their runtimes expect these ids. A source with last-token
    logits has the graph with all logits beside it; so has the output.

    Raises:
        RefusalError: the graph is not understood.
    """
    name = graph_file(source)
    last_only = (source / ALL_LOGITS_FILE).is_file()
    rewritten = (name, f"{name}.data", ALL_LOGITS_FILE)
    out.mkdir()
    for file in sorted(source.iterdir()):
        if file.is_file() and goes_with_graph(file) and (file.name not in rewritten or not maps):
            shutil.copyfile(file, out / file.name)
    if not maps:
        return
    model = read_graph(source / all_logits_file(source))
    rewrite_model(model, maps, tap)
    ir.save(model, out / name, external_data=f"{name}.data")
    if name == STATIC_GRAPH_FILE:
        make_dense(out / name)
    if last_only:
        keep_last_token(out)
