"""Turns a decoder graph and a plan into the NBL graph: an ordered list of passes, one subject each.

Passes change the graph in place and report whether they did. A pass refuses what it does not understand, with layer and
reason. A plan that asks for m layers and would rewrite fewer is an error.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import cache_layers, graph_caches
from nbl_export.graph.emitter import run_passes
from nbl_export.graph.names import ALL_LOGITS_FILE, GENAI_CONFIG, STATIC_GRAPH_FILE, all_logits_file, graph_file
from nbl_export.mixers.base import Mixer
from nbl_export.records.decoder import GraphContract, TensorInfo
from nbl_export.records.plan import Plan, spoken_layers
from nbl_export.rewrite.bypass import BypassAttention, SkipNormToAdd, Sweep
from nbl_export.rewrite.caches import DropCaches, DropUnreadCaches, RenumberCaches
from nbl_export.rewrite.quantize import QuantizeMapBlocks, QuantizeMaps
from nbl_export.rewrite.tail import keep_last_token
from nbl_export.rewrite.token_table import TabulateTokens

__all__ = ["contract_of", "make_dense", "passes_for", "rewrite", "rewrite_model"]


def passes_for(
    plan: Plan, maps: Mapping[int, Mixer], rows_VD: np.ndarray | None = None
) -> Sequence[ir.passes.PassBase]:
    """The passes of the rewrite, in order."""
    chosen = {layer: maps[layer] for layer in plan.replaced}
    return (
        BypassAttention(chosen, plan.tap),
        DropCaches(plan.replaced),
        Sweep(),
        DropUnreadCaches(),
        SkipNormToAdd(),
        TabulateTokens(rows_VD),
        Sweep(),
        QuantizeMaps(),
        QuantizeMapBlocks(),
        Sweep(),
    )


def rewrite_model(model: ir.Model, plan: Plan, maps: Mapping[int, Mixer], rows_VD: np.ndarray | None = None) -> None:
    """Rewrite a model in place; the empty plan changes nothing.

    Args:
        rows_VD: input of the first kept layer for each token (`token_rows`), looked up instead of computed.

    Raises:
        RefusalError: the graph is not understood, or lacks layers of the plan.
    """
    if not plan.replaced:
        return
    before = graph_caches(model.graph)
    missing = set(plan.replaced) - set(before)
    if missing:
        left = spoken_layers(list(before))
        raise RefusalError(min(missing), f"it has no attention, so it is replaced already; layers {left} have some")
    _refuse_several_states([maps[layer] for layer in plan.replaced])
    run_passes(passes_for(plan, maps, rows_VD), model)
    after = [value for pasts, _ in graph_caches(model.graph).values() for value in pasts]
    if after != [value for layer in before if layer not in plan.replaced for value in before[layer][0]]:
        names = [value.name for value in after]
        raise RefusalError(None, f"caches {names} remain after replacing {list(plan.replaced)}")


def _refuse_several_states(mixers: Sequence[Mixer]) -> None:
    """ONNX Runtime GenAI takes states of one shape."""
    if len({mixer.state for mixer in mixers if mixer.state is not None}) > 1:
        raise RefusalError(None, "its layers would have states of several sizes; ONNX Runtime GenAI takes one")


def rewrite(
    source: Path,
    out: Path,
    plan: Plan,
    maps: Mapping[int, Mixer],
    *,
    dense: bool = False,
    rows_VD: np.ndarray | None = None,
) -> None:
    """Write the NBL version of a deployable directory to `out`, which must not exist.

    Kept weights are copied from file to file. An empty plan copies the graph byte for byte. A decoder.onnx gets dense
    cache ids; a model.onnx keeps the ids of its layers unless `dense` is set. Their runtimes expect these ids. A
    source with last-token logits has the graph with all logits beside it; so has the output.

    Raises:
        RefusalError: the graph is not understood.
    """
    name = graph_file(source)
    last_only = (source / ALL_LOGITS_FILE).is_file()
    rewritten = (name, f"{name}.data", ALL_LOGITS_FILE)
    out.mkdir()
    for file in sorted(source.iterdir()):
        if file.is_file() and (file.name not in rewritten or not plan.replaced):
            shutil.copyfile(file, out / file.name)
    if not plan.replaced:
        return
    model = ir.load(source / all_logits_file(source))
    rewrite_model(model, plan, maps, rows_VD)
    ir.save(model, out / name, external_data=f"{name}.data")
    if dense or name == STATIC_GRAPH_FILE:
        make_dense(out / name)
        _count_caches(out / GENAI_CONFIG, len(plan.kept))
    if last_only:
        keep_last_token(out)


def _count_caches(path: Path, caches: int) -> None:
    """Set the number of caches, which GenAI counts from 0 if it does not find their names in the graph."""
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["model"]["decoder"]["num_hidden_layers"] = caches
        path.write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")


def make_dense(path: Path) -> None:
    """Give a saved graph cache ids 0..K-1; its data file does not change."""
    model = ir.load(path)
    RenumberCaches()(model)
    ir.save(model, path)


def contract_of(model: ir.Model) -> GraphContract:
    """Names, element types and dimensions of a decoder graph, and the layers that keep a cache."""
    return GraphContract(
        tuple(_info(v) for v in model.graph.inputs),
        tuple(_info(v) for v in model.graph.outputs),
        cache_layers(model.graph),
    )


def _info(value: ir.Value) -> TensorInfo:
    dtype = value.dtype.numpy().name if value.dtype is not None else "?"
    dims = () if value.shape is None else tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorInfo(str(value.name), dtype, dims)
