"""Finds the decoder graph of a run directory or of a model directory, for scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.graph.genai_config import check_genai_config, read_genai_config
from nbl_export.graph.names import (
    ALL_LOGITS_IR,
    GENAI_CONFIG,
    IR_FILE,
    MANIFEST,
    all_logits_file,
)
from nbl_export.run_directory import RunDirectory
from nbl_export.targets import load_engine
from nbl_export.targets.onnx.decoder import OnnxDecoder
from nbl_export.targets.openvino.decoder import IrDecoder
from nbl_export.targets.openvino.facts import read_ir_facts

__all__ = ["GRAPH_VARIANTS", "GraphPlace", "find_graph"]

GRAPH_VARIANTS = {"original": ("decoder", "original"), "nbl": ("rewrite", "model")}  # -> stage, directory


@dataclass(frozen=True)
class GraphPlace:
    """A directory with a decoder graph and a tokenizer, and facts that the graph does not state."""

    directory: Path
    head_dim: int
    max_positions: int

    def open(self, threads: int | None = None) -> OnnxDecoder | IrDecoder:
        """Open the graph on its engine; if there are two graphs, the graph with the logits of all positions."""
        if (self.directory / IR_FILE).is_file():
            every = (self.directory / ALL_LOGITS_IR).is_file()
            return IrDecoder(self.directory, ALL_LOGITS_IR if every else IR_FILE, threads=threads)
        return OnnxDecoder(self.directory, self.head_dim, threads, file=all_logits_file(self.directory))


def find_graph(path: Path, variant: str = "nbl") -> GraphPlace:
    """The graph of a variant in a run directory, or the graph of a model directory.

    Raises:
        NblError: there is no graph, the graph is compiled, or its directory lacks facts.
        CorruptError: a file is missing or has changed since it was written.
    """
    if variant not in GRAPH_VARIANTS:
        raise NblError(f"variant is {' or '.join(GRAPH_VARIANTS)}, not {variant!r}")
    if (path / GENAI_CONFIG).is_file():
        return _deployable(path)
    if (path / IR_FILE).is_file():
        facts = read_ir_facts(path)
        return GraphPlace(path, facts.head_dim, facts.context_length)
    if not (path / MANIFEST).is_file():
        raise NblError(f"{path} is neither a run directory nor a model directory; nbl-export --output makes one")
    run = RunDirectory.peek(path)
    engine = run.manifest["options"]["engine"]
    if load_engine(engine).capabilities.static:
        raise NblError(
            f"{path} is a run for engine {engine}, and ONNX Runtime cannot evaluate its graphs; evaluate a run with "
            "--engine ort, or the torch models (--variants torch-original,torch-nbl)"
        )
    stage, name = GRAPH_VARIANTS[variant]
    if stage not in run.stages:
        raise NblError(f"{path} is not finished: run its command again ({run.manifest['command']})")
    run.check(stage)
    if (path / name / GENAI_CONFIG).is_file():
        check_genai_config(path / name)
    decoder = run.manifest["decoder"]
    return GraphPlace(path / name, int(decoder["head_dim"]), int(decoder["max_positions"]))


def _deployable(directory: Path) -> GraphPlace:
    """The graph of a model directory, which may come from another tool."""
    path = directory / GENAI_CONFIG
    settings = read_genai_config(directory)
    try:
        model: dict[str, Any] = settings["model"]
        return GraphPlace(directory, int(model["decoder"]["head_size"]), int(model["context_length"]))
    except (ValueError, KeyError, TypeError) as error:
        raise NblError(f"{path} cannot be read ({error!r}); export the model again") from error
