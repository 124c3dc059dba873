"""A decoder graph of any exporter, as `inspect` and `rewrite-graph` take it: its place, and the files of it.

DIR/model.onnx, or DIR/onnx/model.onnx, with its data ─┬─► the graph (`graph.files`)
config.json, genai_config.json, tokenizer, ...        ─┴─► `companions`, which go with the graph
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbl_export.errors import MissingPackageError, NblError
from nbl_export.graph.genai_config import check_genai_config
from nbl_export.graph.names import GENAI_CONFIG, MANIFEST, TEXT_FILES, goes_with_graph
from nbl_export.trust.contained import check_folder, check_inside, refuse_special

__all__ = ["check_graph_place", "companions", "has_graph", "home_of", "onnx_tools", "refuse_graph"]


def refuse_graph(path: Path) -> None:
    """Raise NblError if a model is an ONNX graph, or a directory with a graph and no weights for torch."""
    weights = path.is_dir() and (any(path.glob("*.safetensors")) or any(path.glob("*.gguf")))
    if path.exists() and has_graph(path) and not weights:
        raise NblError(
            f"{path} is an ONNX graph, and a job needs the checkpoint that it was made from; "
            "nbl-export rewrite-graph puts the maps of a job into a graph"
        )


def onnx_tools() -> Any:
    """The package `graph`, with the modules that need onnx.

    Raises:
        MissingPackageError: onnx or onnx_ir is not installed.
    """
    try:
        import nbl_export.graph.facts
        import nbl_export.graph.files
    except ImportError as error:
        raise MissingPackageError(str(error.name), "rewrite", "reading ONNX graphs") from error
    return nbl_export.graph


log = logging.getLogger(__name__)
_BESIDE_A_FILE = (*TEXT_FILES, GENAI_CONFIG)


def has_graph(path: Path) -> bool:
    """Whether a path is an ONNX file, or a directory that holds one; a run directory has graphs one level down."""
    return path.suffix == ".onnx" or any(any(path.glob(pattern)) for pattern in ("*.onnx", "onnx/*.onnx"))


def home_of(graph: Path) -> Path:
    """The directory of a graph's configuration and tokenizer: its own, or the parent if the graph lies in DIR/onnx."""
    inside = graph.parent.name == "onnx" and not (graph.parent / "config.json").is_file()
    return graph.parent.parent if inside else graph.parent


def check_graph_place(path: Path) -> None:
    """Check a folder, or a file and what is read beside it.

    Raises:
        CorruptError: names an entry that is a link out of the folder, a pipe, a socket or a device.
    """
    if path.is_dir():
        check_folder(path)
        return
    for file in (path, *(path.parent / name for name in _BESIDE_A_FILE)):
        refuse_special(file)
        check_inside(file, path.parent)


def companions(path: Path, skipped: set[Path]) -> Iterator[tuple[Path, Path]]:
    """Files that belong to the graph, and their names in the output. Code and pickles do not belong to a graph.

    Raises:
        CorruptError: a file is a link that leads out of the directory.
        NblError: genai_config.json has a refused key.
    """
    check_genai_config(path.parent if path.is_file() else path)
    if path.is_file():
        files = [path.parent / name for name in _BESIDE_A_FILE if (path.parent / name).is_file()]
        directory = path.parent
    else:
        directory = path
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    left_out: list[str] = []
    for file in files:
        name = file.relative_to(directory)
        if file in skipped or str(name) == MANIFEST or any(part.startswith(".") for part in name.parts):
            continue
        if goes_with_graph(file):
            yield check_inside(file, directory), name
        else:
            left_out.append(str(name))
    if left_out:
        names = ", ".join(left_out[:9])
        log.warning("%s: left out, since only graphs, their data and text files are copied: %s", directory, names)
