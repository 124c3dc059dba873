"""A run directory or a model directory -> the decoder graph in it, ready for scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.artifacts import RunDirectory
from nbl_export.engines import load_engine
from nbl_export.engines.onnx_decoder import OnnxDecoder, all_logits_file
from nbl_export.errors import NblError
from nbl_export.genai_config import check_genai_config, read_genai_config

__all__ = ["GRAPH_VARIANTS", "GraphPlace", "find_graph"]

GRAPH_VARIANTS = {"original": ("decoder", "original"), "nbl": ("rewrite", "model")}  # -> stage, directory


@dataclass(frozen=True)
class GraphPlace:
    """A directory with model.onnx and a tokenizer, and what cannot be read off the graph."""

    directory: Path
    head_dim: int
    max_positions: int

    def open(self, threads: int | None = None) -> OnnxDecoder:
        """The graph on ONNX Runtime, that with the logits of all positions where there are two."""
        return OnnxDecoder(self.directory, self.head_dim, threads, file=all_logits_file(self.directory))


def find_graph(path: Path, variant: str = "nbl") -> GraphPlace:
    """The graph of a variant in a run directory, or the one of a model directory.

    Raises:
        NblError: there is none, it is compiled, or its directory says too little.
        CorruptError: a file is missing or not what was written there.
    """
    if variant not in GRAPH_VARIANTS:
        raise NblError(f"variant is {' or '.join(GRAPH_VARIANTS)}, not {variant!r}")
    if (path / "genai_config.json").is_file():
        return _deployable(path)
    if not (path / "nbl.json").is_file():
        raise NblError(f"{path} is neither a run directory nor a model directory; nbl-export --output makes one")
    run = RunDirectory.peek(path)
    engine = run.manifest["options"]["engine"]
    if load_engine(engine).CAPABILITIES.static:
        raise NblError(
            f"{path} is a run for engine {engine}, whose graphs are for its compiler; evaluate a run with "
            "--engine ort, or the torch models (--variants torch-original,torch-nbl)"
        )
    stage, name = GRAPH_VARIANTS[variant]
    if stage not in run.stages:
        raise NblError(f"{path} is not finished: run its command again ({run.manifest['command']})")
    run.check(stage)
    check_genai_config(path / name)
    decoder = run.manifest["decoder"]
    return GraphPlace(path / name, int(decoder["head_dim"]), int(decoder["max_positions"]))


def _deployable(directory: Path) -> GraphPlace:
    """A model directory by itself, also one that another tool wrote."""
    path = directory / "genai_config.json"
    settings = read_genai_config(directory)
    try:
        model: dict[str, Any] = settings["model"]
        return GraphPlace(directory, int(model["decoder"]["head_size"]), int(model["context_length"]))
    except (ValueError, KeyError, TypeError) as error:
        raise NblError(f"{path} cannot be read ({error!r}); export the model again") from error
