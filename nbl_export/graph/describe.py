"""What is recognised in a decoder graph, and which of its layers can be rewritten, as JSON values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import find_block, graph_caches
from nbl_export.graph.facts import decoder_facts, logits_of, replaced_layers
from nbl_export.graph.files import data_files, find_graph, load_graph
from nbl_export.graph.given import check_graph_place, home_of

__all__ = ["describe_graph"]


def describe_graph(path: Path) -> dict[str, Any]:
    """Describe a graph file: what is recognised in it, and which layers can be rewritten.

    Raises:
        NblError: there is no graph, the graph is not whole, or it is no decoder with caches.
    """
    check_graph_place(path)
    file = find_graph(path)
    model = load_graph(file)
    graph = model.graph
    layers = []
    first = None
    for layer, (pasts, _) in graph_caches(graph).items():
        found: dict[str, Any] = {"layer": layer, "caches": [str(v.name) for v in pasts], "taps": [], "reason": None}
        try:
            block = find_block(graph, layer)
            found["taps"] = ["residual", *(["normed"] if block.normed is not None else [])]
            first = first or block
        except RefusalError as error:
            found["reason"] = error.reason
        layers.append(found)
    return {
        "graph": str(file),
        "bytes": file.stat().st_size + sum(data.stat().st_size for data in data_files(file, model)),
        **decoder_facts(graph, first, home_of(file)),
        "logits": logits_of(graph),
        "replaced_layers": replaced_layers(graph),
        "layers": layers,
    }
