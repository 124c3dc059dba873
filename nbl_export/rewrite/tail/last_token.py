"""A directory with two graphs on the same data: one gives the logits of the last token, the other all logits.

    model.onnx       the deployed graph: behind the last kept attention it computes one token (`tail`)
    all_logits.onnx  the graph before pruning; for perplexity, verification and log-probabilities of a prompt
    model.onnx.data  weights of both
    (decoder.onnx and its data in a directory of the static form, which its compiler reads)

External data cannot lie outside a graph's directory, so both graphs share a directory. Runtimes do not open the second
graph: GenAI opens the file that genai_config.json names, others open model.onnx. A rewrite starts from the second
graph, because the result has another last kept layer and so a longer tail.
"""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.names import ALL_LOGITS_FILE, graph_file
from nbl_export.rewrite.tail import PruneTail

__all__ = ["difference", "keep_last_token"]


def keep_last_token(directory: Path) -> None:
    """Rename the graph to all_logits.onnx, byte for byte, and write the pruned graph in its place.

    Raises:
        RefusalError: the tail of this graph cannot be pruned; no file has changed.
    """
    path = directory / graph_file(directory)
    model = _pruned(path)
    os.replace(path, directory / ALL_LOGITS_FILE)
    ir.save(model, path)


def difference(directory: Path) -> str:
    """How the deployed graph differs from the pruned all_logits.onnx; "" if all nodes and weights are equal."""
    if not (directory / ALL_LOGITS_FILE).is_file():
        return f"there is no {ALL_LOGITS_FILE}"
    expected = ir.to_proto(_pruned(directory / ALL_LOGITS_FILE))
    found = ir.to_proto(ir.load(directory / graph_file(directory)))
    for kind in ("input", "output", "initializer", "node"):
        ours, theirs = getattr(found.graph, kind), getattr(expected.graph, kind)
        if len(ours) != len(theirs):
            return f"{len(ours)} {kind}s, not {len(theirs)}"
        for one, other in zip(ours, theirs, strict=True):
            if one.SerializeToString(deterministic=True) != other.SerializeToString(deterministic=True):
                return f"{kind} {one.name} differs"
    return ""


def _pruned(path: Path) -> ir.Model:
    model = ir.load(path)
    try:
        PruneTail()(model)
    except RefusalError as error:
        raise RefusalError(
            error.layer, f"{error.reason} (nodes behind the last attention cannot be pruned; use --logits all)"
        ) from error
    return model
