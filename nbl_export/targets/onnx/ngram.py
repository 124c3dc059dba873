"""Writes a decoder for n-gram decoding (prompt lookup) in ONNX Runtime GenAI, which verifies several tokens in a step.

    original/ all_logits.onnx ─ copied ─► model.onnx          logits of every position, which verifying needs
    original/ model.onnx.data, ... ─────► the same            copied, since onnx refuses hard links
    genai_config.json ◄─ speculative, search.chunk_size

GenAI 0.18 looks for the last two tokens earlier in the text, and proposes what followed them there. One step of the
decoder verifies all proposed tokens, so the decoder decides each token. `speculative` has the names and the limits of
`GeneratorParams.set_speculative_options`, which replaces these options for one answer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from nbl_export.errors import NblError
from nbl_export.graph.genai_config import read_genai_config
from nbl_export.graph.names import ALL_LOGITS_FILE, GENAI_CONFIG, GRAPH_FILE, MANIFEST, all_logits_file, goes_with_graph
from nbl_export.trust.model_settings import drop_code

__all__ = ["write_ngram"]

# The fastest of three settings that were tried in float32. "Chained" goes on from the end of what was found.
_OPTIONS = {"ngram_size": 3, "max_draft_tokens": 8, "ngram_chained_lookup": True}
_CHUNK_TOKENS = 512  # of a prompt: GenAI keeps the logits of all positions of a chunk


def write_ngram(original: Path, out: Path) -> None:
    """Write a deployable directory to `out`, which must not exist.

    Args:
        original: a deployable directory of ONNX Runtime GenAI.

    Raises:
        NblError: `original` is of another engine.
    """
    if not (original / GENAI_CONFIG).is_file():
        raise NblError(
            f"{original} is not for ONNX Runtime GenAI, which decodes with n-grams; use a run of --engine ort"
        )
    settings = read_genai_config(original)
    out.mkdir()
    for file in sorted(original.iterdir()):
        if file.is_file() and goes_with_graph(file) and file.name not in (ALL_LOGITS_FILE, GRAPH_FILE, MANIFEST):
            shutil.copyfile(file, out / file.name)
    shutil.copyfile(original / all_logits_file(original), out / GRAPH_FILE)
    settings["search"]["chunk_size"] = _CHUNK_TOKENS
    settings["speculative"] = _OPTIONS
    (out / GENAI_CONFIG).write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")
    drop_code(out)
