"""Finds the decoder graph of a run directory or of a model directory, for scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from nbl_export.errors import NblError
from nbl_export.graph.names import MANIFEST
from nbl_export.run_directory import DECODERS, SUBJECTS, RunDirectory
from nbl_export.targets import load_engine, owner_of
from nbl_export.targets.base import Target
from nbl_export.targets.runners import RewindingDecoder
from nbl_export.trust.contained import check_folder

__all__ = ["GraphPlace", "find_graph"]


@dataclass(frozen=True)
class GraphPlace:
    """A directory with a decoder graph and a tokenizer, and facts that the graph does not state."""

    directory: Path
    target: Target
    head_dim: int
    max_positions: int

    def open(self, threads: int | None = None) -> RewindingDecoder:
        """Open the graph on its engine; if there are two graphs, the graph with the logits of all positions."""
        return cast(RewindingDecoder, self.target.open_graph(self.directory, self.head_dim, threads=threads))


def find_graph(path: Path, variant: str = "nbl") -> GraphPlace:
    """The graph of a variant in a run directory, or the graph of a model directory.

    Raises:
        NblError: there is no graph, the graph is compiled, or its directory lacks facts.
        CorruptError: a file is missing or has changed since it was written.
    """
    if variant not in DECODERS:
        raise NblError(f"variant is {' or '.join(DECODERS)}, not {variant!r}")
    if (owner := owner_of(path)) is not None:
        check_folder(path)
        return _place(path, owner)
    if not (path / MANIFEST).is_file():
        raise NblError(f"{path} is neither a run directory nor a model directory; nbl-export --output makes one")
    run = RunDirectory.peek(path)
    engine = run.manifest["options"]["engine"]
    target = load_engine(engine)
    if target.capabilities.static:
        raise NblError(
            f"{path} is a run for engine {engine}, and ONNX Runtime cannot evaluate its graphs; evaluate a run with "
            "--engine ort, or the torch models (--variants torch-original,torch-nbl)"
        )
    stage, name = SUBJECTS[variant].stage, SUBJECTS[variant].directory
    if stage not in run.stages:
        raise NblError(f"{path} is not finished: run its command again ({run.manifest['command']})")
    run.check(stage)
    check_folder(path / name)
    if target.owns(path / name):
        return _place(path / name, target)
    decoder = run.manifest["decoder"]  # a graph that is not the runtime's
    return GraphPlace(path / name, target, int(decoder["head_dim"]), int(decoder["max_positions"]))


def _place(directory: Path, target: Target) -> GraphPlace:
    facts = target.facts(directory)
    return GraphPlace(directory, target, facts.head_dim, facts.context_length)
