"""Names of the files of a decoder."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "ALL_LOGITS_FILE",
    "ALL_LOGITS_IR",
    "DETOKENIZER_IR",
    "GENAI_CONFIG",
    "GENERATION_CONFIG",
    "GRAPH_FILE",
    "IR_FILE",
    "IR_WEIGHTS",
    "MANIFEST",
    "STATIC_GRAPH_FILE",
    "TOKENIZER_IR",
    "all_logits_file",
    "draft_file",
    "draft_folder",
    "graph_file",
]

GRAPH_FILE = "model.onnx"
STATIC_GRAPH_FILE = "decoder.onnx"  # the static form at the deployed precision, for a compiler
ALL_LOGITS_FILE = "all_logits.onnx"  # the same graph with all logits, beside a graph with last-token logits
GENAI_CONFIG = "genai_config.json"
IR_FILE = "openvino_model.xml"
IR_WEIGHTS = "openvino_model.bin"
ALL_LOGITS_IR = "openvino_all_logits.xml"  # the same graph with all logits; it reads the same constants
TOKENIZER_IR = "openvino_tokenizer.xml"
DETOKENIZER_IR = "openvino_detokenizer.xml"
GENERATION_CONFIG = "generation_config.json"
MANIFEST = "nbl.json"  # in a run directory and in a deployable directory


def graph_file(directory: Path) -> str:
    """Name of the graph in a deployable directory."""
    return STATIC_GRAPH_FILE if (directory / STATIC_GRAPH_FILE).is_file() else GRAPH_FILE


def all_logits_file(directory: Path) -> str:
    """Name of the graph with the most logits in a deployable directory."""
    return ALL_LOGITS_FILE if (directory / ALL_LOGITS_FILE).is_file() else graph_file(directory)


def draft_file(draft: str) -> str:
    """Name of a draft's graph, beside the graph of the decoder whose tokens it proposes."""
    return f"{draft}_draft.onnx"


def draft_folder(draft: str) -> str:
    """Name of an IR draft's folder, in the folder of the decoder whose tokens it proposes."""
    return f"{draft}_draft"
