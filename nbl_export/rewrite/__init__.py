"""A decoder graph and a plan in, the NBL graph out: an ordered list of passes, one subject each.

Passes change the graph in place and say whether they did. They refuse, with layer and reason, what they do
not understand; a plan that asks for m layers and would rewrite fewer is an error.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from nbl_export.engines.onnx_decoder import ALL_LOGITS_FILE, STATIC_GRAPH_FILE, all_logits_file, graph_file
from nbl_export.errors import RefusalError
from nbl_export.records import AffineMap, GraphContract, PassReport, Plan, TensorInfo
from nbl_export.rewrite.anatomy import cache_layers, graph_caches
from nbl_export.rewrite.bypass import BypassAttention
from nbl_export.rewrite.caches import DropCaches, DropUnreadCaches
from nbl_export.rewrite.last_token import keep_last_token
from nbl_export.rewrite.quantize import QuantizeMaps
from nbl_export.rewrite.quantize_blocks import QuantizeMapBlocks
from nbl_export.rewrite.renumber import RenumberCaches
from nbl_export.rewrite.sweep import SkipNormToAdd, Sweep
from nbl_export.rewrite.tail import PruneTail
from nbl_export.rewrite.token_table import TabulateTokens

__all__ = ["contract_of", "make_dense", "passes_for", "rewrite", "rewrite_model"]


def passes_for(
    plan: Plan, maps: Mapping[int, AffineMap], map_bits: int | None = None, rows_VD: np.ndarray | None = None
) -> Sequence[ir.passes.PassBase]:
    """The rewrite, in order."""
    chosen = {layer: maps[layer] for layer in plan.replaced}
    drop = DropCaches(plan.replaced)
    return (
        BypassAttention(chosen, plan.tap),
        drop,
        Sweep(),
        DropUnreadCaches(drop),
        SkipNormToAdd(),
        TabulateTokens(rows_VD),
        Sweep(),
        QuantizeMaps(map_bits),
        QuantizeMapBlocks(),
        Sweep(),
    )


def rewrite_model(
    model: ir.Model,
    plan: Plan,
    maps: Mapping[int, AffineMap],
    map_bits: int | None = None,
    rows_VD: np.ndarray | None = None,
) -> tuple[PassReport, ...]:
    """Rewrite in place. With the empty plan nothing is touched.

    Args:
        map_bits: of the maps where the graph's matrices are quantised; 32 leaves them float32, None takes theirs.
        rows_VD: what enters the first kept layer for each token (`token_rows`), to be looked up instead of computed.

    Raises:
        RefusalError: the graph is not understood, or does not have the plan's layers.
    """
    if not plan.replaced:
        return ()
    before = graph_caches(model.graph)
    missing = set(plan.replaced) - set(before)
    if missing:
        raise RefusalError(min(missing), f"the graph has attention caches for layers {list(before)} only")
    reports = [
        PassReport(type(step).__name__, step(model).modified) for step in passes_for(plan, maps, map_bits, rows_VD)
    ]
    after = [value for pasts, _ in graph_caches(model.graph).values() for value in pasts]
    if after != [value for layer in before if layer not in plan.replaced for value in before[layer][0]]:
        names = [value.name for value in after]
        raise RefusalError(None, f"caches {names} remain after replacing {list(plan.replaced)}")
    return tuple(reports)


def rewrite(
    source: Path,
    out: Path,
    plan: Plan,
    maps: Mapping[int, AffineMap],
    *,
    dense: bool = False,
    map_bits: int | None = None,
    rows_VD: np.ndarray | None = None,
) -> tuple[PassReport, ...]:
    """Write the NBL version of a deployable directory to `out` (which must not exist).

    Weights that stay are copied from file to file; an empty plan copies the graph byte for byte. A decoder.onnx gets
    dense cache ids, a model.onnx keeps its layers' (what the runtimes of each expect) unless `dense`. A source that
    gives the logits of the last token has the graph with all of them beside it; so has what is written.

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
        return ()
    model = ir.load(source / all_logits_file(source))
    reports = rewrite_model(model, plan, maps, map_bits, rows_VD)
    ir.save(model, out / name, external_data=f"{name}.data")
    if dense or name == STATIC_GRAPH_FILE:
        reports = (*reports, make_dense(out / name))
        _count_caches(out / "genai_config.json", len(plan.kept))
    if last_only:
        keep_last_token(out)
        reports = (*reports, PassReport(PruneTail.__name__, True))
    return reports


def _count_caches(path: Path, caches: int) -> None:
    """GenAI names caches 0..num_hidden_layers-1 where it does not find their names in the graph."""
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["model"]["decoder"]["num_hidden_layers"] = caches
        path.write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")


def make_dense(path: Path) -> PassReport:
    """Give a saved graph cache ids 0..K-1; its data stays as it is."""
    model = ir.load(path)
    report = PassReport("RenumberCaches", RenumberCaches()(model).modified)
    ir.save(model, path)
    return report


def contract_of(model: ir.Model) -> GraphContract:
    """Names, element types and dimensions of a decoder graph, and which layers keep a cache."""
    return GraphContract(
        tuple(_info(v) for v in model.graph.inputs),
        tuple(_info(v) for v in model.graph.outputs),
        cache_layers(model.graph),
    )


def _info(value: ir.Value) -> TensorInfo:
    dtype = value.dtype.numpy().name if value.dtype is not None else "?"
    dims = () if value.shape is None else tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorInfo(str(value.name), dtype, dims)
