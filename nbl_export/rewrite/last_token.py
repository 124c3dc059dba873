"""A directory whose graph gives the logits of the last token, beside the graph with all of them on the same data.

    model.onnx       what ships and runs: everything behind the last kept attention on one token (`tail`)
    all_logits.onnx  the graph before that; for perplexity, verification and log-probabilities of a prompt
    model.onnx.data  weights of both
    (decoder.onnx and its data in a directory of the static form, which is what its compiler reads)

External data cannot lie outside a graph's directory, so the second graph lies beside the first. Runtimes do not look
at it: GenAI opens the file that genai_config.json names, others model.onnx. What a rewrite starts from is the second:
the last kept layer of its result is another one, so that its tail is longer.
"""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir

from nbl_export.engines.onnx_decoder import ALL_LOGITS_FILE, graph_file
from nbl_export.errors import RefusalError
from nbl_export.rewrite.tail import PruneTail

__all__ = ["difference", "keep_last_token"]


def keep_last_token(directory: Path) -> None:
    """Turn the graph into all_logits.onnx, byte for byte, and write the pruned one in its place.

    Raises:
        RefusalError: the tail of this graph cannot be pruned; nothing has changed.
    """
    path = directory / graph_file(directory)
    model = _pruned(path)
    os.replace(path, directory / ALL_LOGITS_FILE)
    ir.save(model, path)


def difference(directory: Path) -> str:
    """How the graph that ships differs from the one with all logits, pruned; "" where node and weight agree."""
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
            error.layer, f"{error.reason} (what is behind the last attention cannot be cut down; use --logits all)"
        ) from error
    return model
