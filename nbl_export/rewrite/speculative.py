"""Writes the folder of lossless decoding: the original decoder, and drafts that propose tokens to it.

    original/ all_logits.onnx ─ PruneTail(17) ─► model.onnx      logits of the last 17 positions, zeros before
    draft folder model.onnx ───── copied ──────► int4_draft.onnx or nbl_draft.onnx, each with its data
    genai_config.json ───────────────────────► model.draft and speculative, as ONNX Runtime GenAI reads them

A graph's data lies in its own directory, and onnx refuses hard links, so weights are copied.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.caches import graph_states
from nbl_export.graph.files import read_graph
from nbl_export.graph.genai_config import TAKING_TURNS
from nbl_export.graph.names import ALL_LOGITS_FILE, GENAI_CONFIG, GRAPH_FILE, MANIFEST, all_logits_file, draft_file
from nbl_export.records.capabilities import MOST_ROWS, Proposer
from nbl_export.rewrite.tail import PruneTail

__all__ = ["add_draft", "settle", "write_target"]


_CHUNK_TOKENS = 512  # of a prompt: GenAI's buffer of logits has a row for each token of a chunk, mostly zeros


def write_target(original: Path, out: Path) -> None:
    """Write a deployable directory to `out` with the last positions' logits; `out` must not exist.

    Raises:
        RefusalError: the tail of this graph cannot be pruned.
    """
    out.mkdir()
    for file in sorted(original.iterdir()):
        if file.is_file() and file.name not in (ALL_LOGITS_FILE, GRAPH_FILE, MANIFEST):
            shutil.copyfile(file, out / file.name)
    model = read_graph(original / all_logits_file(original))
    PruneTail(MOST_ROWS)(model)
    ir.save(model, out / GRAPH_FILE)
    settings = _settings(out)
    settings["search"]["chunk_size"] = _CHUNK_TOKENS
    _write(settings, out)


def add_draft(source: Path, out: Path, draft: str) -> dict[str, Any]:
    """Copy a deployable directory's graph into `out` as a draft; returns its block of genai_config.json, if any."""
    file, model = draft_file(draft), read_graph(source / GRAPH_FILE)
    if states := graph_states(model.graph):
        raise RefusalError(min(states), "it has a state, which cannot forget the tokens that are not accepted")
    ir.save(model, out / file, external_data=f"{file}.data")
    block: dict[str, Any] = _settings(source)["model"]["decoder"]
    return {**block, "filename": file}


def settle(out: Path, proposer: Proposer, drafts: Mapping[str, Mapping[str, Any]]) -> None:
    """Make a proposer the folder's own; the files of other drafts are removed.

    Args:
        drafts: name of each draft in `out` -> its block of genai_config.json.
    """
    for draft in drafts:
        if draft != proposer.draft:
            for name in (draft_file(draft), f"{draft_file(draft)}.data"):
                os.remove(out / name)
    settings = _settings(out)
    if proposer.draft in drafts:
        model = settings["model"] = {**settings["model"], "draft": dict(drafts[proposer.draft])}
        for decoder in (model["decoder"], model["draft"]):
            decoder["session_options"] = {**decoder["session_options"], **TAKING_TURNS}
    settings["speculative"] = dict(proposer.options)
    _write(settings, out)


def _settings(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / GENAI_CONFIG).read_text(encoding="utf-8"))
    return found


def _write(settings: Mapping[str, Any], directory: Path) -> None:
    (directory / GENAI_CONFIG).write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")
