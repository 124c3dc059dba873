"""What is looked at in a folder before ONNX Runtime GenAI opens it; afterwards GenAI finds nothing else to open."""

from __future__ import annotations

from pathlib import Path

from nbl_export.contained import refuse_links_out
from nbl_export.engines.onnx_decoder import GRAPH_FILE
from nbl_export.genai_config import read_genai_config
from nbl_export.graph_trust import check_graph_file

__all__ = ["check_genai_folder"]


def check_genai_folder(directory: Path) -> None:
    """Hold links, settings and graph of a folder to what may be opened.

    Raises:
        NblError: what is refused, and in which file.
    """
    refuse_links_out(directory)
    decoder = read_genai_config(directory).get("model", {}).get("decoder", {})
    check_graph_file(directory / decoder.get("filename", GRAPH_FILE))
