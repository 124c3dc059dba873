"""A decoder that scores texts: its tokenizer, and the scores of the tokens behind a context. No harness is needed.

graph_reader   a model directory, in ONNX Runtime         torch_reader   a loaded torch model
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.evaluation.scorer import GraphScorer
from nbl_export.graph.names import MANIFEST
from nbl_export.model.checkpoint.load import load_tokenizer
from nbl_export.targets import owner_of
from nbl_export.trust.contained import check_folder
from nbl_export.trust.model_settings import read_object

__all__ = ["TextReader", "graph_reader", "near_of", "torch_reader"]

_ROWS = 16  # most sequences of a batch, which is also bounded by the size of its logits


@dataclass(frozen=True)
class TextReader:
    """What tests of texts ask of a model."""

    tokenizer: Any
    scorer: GraphScorer


def graph_reader(directory: Path, threads: int | None = None, most: int | None = None, rows: int = _ROWS) -> TextReader:
    """The decoder of a model directory; if there are two graphs, that with the logits of all positions.

    Args:
        most: tokens that are read at once; None means the model's positions. rows: most sequences of a batch.

    Raises:
        NblError: there is no graph, it gives logits of the last position only, or its directory lacks facts.
        CorruptError: a file is damaged.
    """
    target = owner_of(directory)
    if target is None:
        raise NblError(f"{directory} is not a model directory; give the model or the original of a run")
    check_folder(directory)
    facts = target.facts(directory)
    decoder = target.open_graph(directory, facts.head_dim, threads=threads)
    positions = min(most or facts.context_length, facts.context_length)
    return TextReader(load_tokenizer(directory), GraphScorer(decoder, positions, rows, near_of(directory)))


def torch_reader(model: Any, tokenizer: Any, positions: int) -> TextReader:
    """A torch model of transformers, one sequence at a time."""
    from nbl_export.model.head import TorchDecoder

    return TextReader(tokenizer, GraphScorer(TorchDecoder(model), positions, rows=1))


def near_of(directory: Path) -> int | None:
    """W of a model directory whose prompts stop at a cut (`mixers.predicted`); None for others."""
    path = directory / MANIFEST
    facts = read_object(path) if path.is_file() else {}
    cut = facts.get("cut")
    return int(cut["near"]) if cut else None
