"""A decoder that scores texts: its tokenizer, and the scores of the tokens behind a context. No harness is needed.

graph_reader   a model directory, in ONNX Runtime         torch_reader   a loaded torch model
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.evaluation.scorer import GraphScorer, Request, TokenScores
from nbl_export.graph.names import MANIFEST
from nbl_export.model.checkpoint.load import load_tokenizer
from nbl_export.targets import owner_of
from nbl_export.trust.contained import check_folder
from nbl_export.trust.model_settings import read_object

__all__ = ["TextReader", "graph_reader", "near_of", "open_graph", "torch_reader"]


@dataclass(frozen=True)
class TextReader:
    """What tests of texts ask of a model."""

    tokenizer: Any
    token_scores: Callable[[Request], TokenScores]


def graph_reader(directory: Path) -> TextReader:
    """The decoder of a model directory; raises as `open_graph`."""
    decoder, positions = open_graph(directory)
    scorer = GraphScorer(decoder, positions, near=near_of(directory))
    return TextReader(load_tokenizer(directory), scorer.token_scores)


def torch_reader(model: Any, tokenizer: Any) -> TextReader:
    """A torch model of transformers."""
    from nbl_export.model.head import token_scores

    def scores(request: Request) -> TokenScores:
        ids = (*request.context, *request.continuation)
        return TokenScores(*token_scores(model, ids, len(request.continuation)))

    return TextReader(tokenizer, scores)


def near_of(directory: Path) -> int | None:
    """W of a model directory whose prompts stop at a cut (`mixers.predicted`); None for others."""
    path = directory / MANIFEST
    facts = read_object(path) if path.is_file() else {}
    cut = facts.get("cut")
    return int(cut["near"]) if cut else None


def open_graph(directory: Path, threads: int | None = None) -> tuple[Any, int]:
    """The decoder of a model directory (if there are two graphs, that with the logits of all positions); its positions.

    Raises:
        NblError: there is no graph, or its directory lacks facts. CorruptError: a file is damaged.
    """
    target = owner_of(directory)
    if target is None:
        raise NblError(f"{directory} is not a model directory; give the model or the original of a run")
    check_folder(directory)
    facts = target.facts(directory)
    return target.open_graph(directory, facts.head_dim, threads=threads), facts.context_length
