"""Checks a folder before ONNX Runtime GenAI opens it; GenAI then opens nothing that was not checked."""

from __future__ import annotations

from pathlib import Path

from nbl_export.graph.genai_config import read_genai_config
from nbl_export.graph.names import GRAPH_FILE
from nbl_export.graph.trust import check_graph_file
from nbl_export.trust.contained import check_folder

__all__ = ["check_genai_folder"]


def check_genai_folder(directory: Path) -> None:
    """Check links, settings and graph of a folder.

    Raises:
        NblError: something is refused; the message names the file.
    """
    check_folder(directory)
    model = read_genai_config(directory).get("model", {})
    for decoder in (model.get("decoder", {}), *([model["draft"]] if "draft" in model else [])):
        check_graph_file(directory / decoder.get("filename", GRAPH_FILE))
