"""Writes the folder of lossless decoding for OpenVINO GenAI.

original/ openvino_all_logits.xml ─► openvino_model.xml      its paged back end computes the positions that it reads
draft folder ──────────────────────► int4_draft/ or nbl_draft/
generation_config.json ◄─ num_assistant_tokens, and max_ngram_size for n-grams
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path

from nbl_export.graph.names import ALL_LOGITS_IR, GENERATION_CONFIG, IR_FILE, MANIFEST, draft_folder
from nbl_export.records.capabilities import Proposer

__all__ = ["add_ir_draft", "settle_ir", "write_ir_target"]


def write_ir_target(original: Path, out: Path) -> None:
    """Write the IR directory with the logits of all positions to `out`, which must not exist."""
    out.mkdir()
    every = (original / ALL_LOGITS_IR).is_file()
    for file in sorted(original.iterdir()):
        if file.is_file() and file.name != MANIFEST and not (every and file.name == IR_FILE):
            shutil.copyfile(file, out / (IR_FILE if file.name == ALL_LOGITS_IR else file.name))


def add_ir_draft(source: Path, out: Path, draft: str) -> None:
    """Copy an IR directory into `out` as a draft."""
    left_out = shutil.ignore_patterns(ALL_LOGITS_IR, MANIFEST)
    shutil.copytree(source, out / draft_folder(draft), ignore=left_out)


def settle_ir(out: Path, proposer: Proposer, drafts: Collection[str]) -> None:
    """Make a proposer the folder's own; the folders of other drafts are removed."""
    for draft in drafts:
        if draft != proposer.draft:
            shutil.rmtree(out / draft_folder(draft))
    path = out / GENERATION_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    settings |= dict(proposer.options)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
