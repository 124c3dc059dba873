"""Names of the files of a decoder, and of what the rewrite adds to its graph."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "ALL_LOGITS_FILE",
    "ALL_LOGITS_IR",
    "CONVERTED",
    "DETOKENIZER_IR",
    "EXIT_ROWS",
    "GENAI_CONFIG",
    "GRAPH_FILE",
    "IR_FILE",
    "IR_WEIGHTS",
    "MANIFEST",
    "OWN_NODES",
    "STATIC_GRAPH_FILE",
    "TEXT_FILES",
    "TOKENIZER_IR",
    "all_logits_file",
    "constant_name",
    "goes_with_graph",
    "graph_file",
    "has_graph",
    "has_ir",
    "node_name",
    "product_name",
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
# What a decoder takes over from its checkpoint: settings, tokenizer and chat template.
TEXT_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
              "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
              "chat_template.jinja")  # fmt: skip
_ENDINGS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md", ".data", "")  # none: texts such as LICENSE
CONVERTED = "source.json"  # in a checkpoint that a conversion wrote
MANIFEST = "nbl.json"  # in a run directory and in a deployable directory
OWN_NODES = "/nbl/"  # begins the names of nodes that the rewrite adds
# The node that takes the rows that continue above an exit layer; the last token's row comes first.
EXIT_ROWS = "/nbl/exit/Rows"


def graph_file(directory: Path) -> str:
    """Name of the graph in a deployable directory."""
    return STATIC_GRAPH_FILE if (directory / STATIC_GRAPH_FILE).is_file() else GRAPH_FILE


def has_graph(path: Path) -> bool:
    """Whether a path is an ONNX file, or a directory that holds one; a run directory has graphs one level down."""
    return path.suffix == ".onnx" or any(any(path.glob(pattern)) for pattern in ("*.onnx", "onnx/*.onnx"))


def has_ir(path: Path) -> bool:
    """Whether a directory holds an IR, or a part of one."""
    return any((path / name).is_file() for name in (IR_FILE, IR_WEIGHTS))


def goes_with_graph(file: Path) -> bool:
    """Whether a file of a graph's directory goes into a copy: a graph, its data or a text file, and never code."""
    return file.suffix in _ENDINGS or file.suffix.startswith(".onnx")  # data may be model.onnx_data_1


def all_logits_file(directory: Path) -> str:
    """Name of the graph with the most logits in a deployable directory."""
    return ALL_LOGITS_FILE if (directory / ALL_LOGITS_FILE).is_file() else graph_file(directory)


def constant_name(layer: int, part: str) -> str:
    """Name of a constant of a replaced layer; `part` is the mixer's own name for it."""
    return f"nbl.layers.{layer}.{part}"


def node_name(layer: int, title: str) -> str:
    """Name of a node of a replaced layer."""
    return f"/nbl/layers.{layer}/{title}"


def product_name(layer: int, part: str) -> str:
    """Name of the node that multiplies by a mixer's matrix."""
    return node_name(layer, "MatMul" if part == "weight" else f"MatMul{part.title()}")
