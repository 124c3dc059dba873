"""What is recognised in a decoder graph, and what the rewrite can do to it, as JSON values."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import PRODUCTS, AttentionBlock, find_block, graph_caches, is_constant
from nbl_export.graph.facts import QUANTISES, decoder_facts, logits_of, replaced_layers
from nbl_export.graph.given import check_graph_place, home_of, onnx_tools
from nbl_export.rewrite.tail import PruneTail

__all__ = ["describe_graph", "graph_facts"]


_SPOKEN = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "INT8": "int8", "UINT8": "int8", "INT4": "int4",
           "UINT4": "int4"}  # fmt: skip


def describe_graph(path: Path) -> dict[str, Any]:
    """Describe a graph file; see `graph_facts`.

    Raises:
        NblError: there is no graph, the graph is not whole, or it is no decoder with caches.
    """
    source = onnx_tools().files
    check_graph_place(path)
    file = source.find_graph(path)

    model = source.load_graph(file)
    size = file.stat().st_size + sum(data.stat().st_size for data in source.data_files(file, model))
    return {"graph": str(file), "bytes": size, **graph_facts(model, home_of(file))}


def graph_facts(model: ir.Model, directory: Path | None = None) -> dict[str, Any]:
    """All facts about a graph; `_prunable` changes the model, so it cannot be used afterwards.

    Args:
        directory: may hold config.json and genai_config.json.

    Raises:
        RefusalError: the graph has no caches that are understood.
    """
    graph = model.graph
    caches = graph_caches(graph)
    blocks: dict[int, AttentionBlock | RefusalError] = {}
    for layer in caches:
        try:
            blocks[layer] = find_block(graph, layer)
        except RefusalError as error:
            blocks[layer] = error
    found = [block for block in blocks.values() if isinstance(block, AttentionBlock)]
    held = {past for pasts, _ in caches.values() for past in pasts}
    kinds = dict(_kinds(graph).most_common())
    facts = {
        "producer": " ".join(str(p) for p in (model.producer_name, model.producer_version) if p) or None,
        "opsets": dict(sorted(model.graph.opset_imports.items())),
        "nodes": len(graph),
        "decoder": decoder_facts(graph, found, directory),
        "inputs": [str(v.name) for v in graph.inputs if v not in held],
        "caches": [_cache_facts(layer, *pair) for layer, pair in caches.items()],
        "precision": next(iter(kinds), None),  # of most matrices
        "weights": kinds,
        "logits": logits_of(graph),
        "replaced_layers": replaced_layers(graph),
        "layers": [_block_facts(layer, block) for layer, block in blocks.items()],
    }
    return {**facts, "tail": _prunable(model, bool(found) and len(found) == len(blocks))}


def _kinds(graph: ir.Graph) -> Counter[str]:
    """Number of matrices of each precision."""
    return Counter(kind for node in graph if (kind := _kind(node)) is not None)


def _kind(node: ir.Node) -> str | None:
    if node.op_type not in PRODUCTS or node.op_type in QUANTISES:
        return None
    if "bits" in node.attributes:
        return f"int{node.attributes['bits'].as_int()}"
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if weight is None or not is_constant(weight):
        return None
    while weight.const_value is None:
        producer = weight.producer()
        if producer is None or not producer.inputs or producer.inputs[0] is None:
            return None
        weight = producer.inputs[0]
    name = weight.const_value.dtype.name
    return _SPOKEN.get(name, name.lower())


def _cache_facts(layer: int, pasts: tuple[ir.Value, ...], presents: tuple[ir.Value, ...]) -> dict[str, Any]:
    dtypes = {_SPOKEN.get(v.dtype.name, v.dtype.name.lower()) for v in pasts if v.dtype is not None}
    shape = [d if isinstance(d, int) else str(d.value) for d in pasts[0].shape] if pasts[0].shape is not None else None
    return {
        "layer": layer,
        "inputs": [str(v.name) for v in pasts],
        "outputs": [str(v.name) for v in presents],
        "dtype": dtypes.pop() if len(dtypes) == 1 else None,
        "shape": shape,
    }


def _block_facts(layer: int, block: AttentionBlock | RefusalError) -> dict[str, Any]:
    if isinstance(block, RefusalError):
        return {"layer": layer, "taps": [], "reason": block.reason}
    return {
        "layer": layer,
        "join": str(block.join.name or block.join.outputs[0].name),
        "residual": str(block.residual.name),
        "attention": str(block.branch.name),
        "taps": ["residual", *(["normed"] if block.normed is not None else [])],
        "reason": None,
    }


def _prunable(model: ir.Model, understood: bool) -> str | None:
    """The reason why the tail cannot be pruned to the last token; None if it can. Prunes this model to find out."""
    if not understood:
        return "not every layer is understood"
    try:
        PruneTail()(model)
    except RefusalError as error:
        return error.reason
    return None
