"""Completes an exported directory so that old and new runtimes load it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from nbl_export.errors import NblError
from nbl_export.graph.names import GENAI_CONFIG, GRAPH_FILE
from nbl_export.trust.contained import check_inside

__all__ = ["TEXT_FILES", "add_text_files", "finish_directory"]

# All files beside the graph that a deployable directory takes over from its checkpoint.
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# transformers 5 writes TokenizersBackend, which transformers 4 does not know. mobius turns that class into
# LlamaTokenizer, which transformers 4 would convert from a missing sentencepiece model. This class works with all.
_PORTABLE_TOKENIZER_CLASS = "PreTrainedTokenizerFast"


def finish_directory(checkpoint: Path, out: Path) -> None:
    """Add config.json and missing tokenizer files; transformers 4 and 5 can then load the tokenizer.

    Raises:
        NblError: the exporter wrote no graph or no runtime configuration.
    """
    for name in (GRAPH_FILE, GENAI_CONFIG):
        if not (out / name).is_file():
            raise NblError(f"the exporter wrote no {name}; try the other --decoder-source")
    add_text_files(checkpoint, out)


def add_text_files(checkpoint: Path, out: Path) -> None:
    """Add missing configuration and tokenizer files; transformers 4 and 5 can then load the tokenizer.

    Raises:
        CorruptError: a file is a link out of the checkpoint's directory.
    """
    for name in TEXT_FILES:
        if (checkpoint / name).is_file() and not (out / name).exists():
            shutil.copyfile(check_inside(checkpoint / name, checkpoint), out / name)
    _make_tokenizer_portable(checkpoint, out)


def _make_tokenizer_portable(checkpoint: Path, out: Path) -> None:
    theirs, ours = checkpoint / "tokenizer_config.json", out / "tokenizer_config.json"
    if not (theirs.exists() and ours.exists() and (out / "tokenizer.json").exists()):
        return
    if json.loads(theirs.read_text(encoding="utf-8")).get("tokenizer_class") != "TokenizersBackend":
        return
    settings = json.loads(ours.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = _PORTABLE_TOKENIZER_CLASS
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])  # no token_type_ids
    ours.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
