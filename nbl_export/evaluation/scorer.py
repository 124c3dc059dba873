"""Log-likelihoods of continuations, and greedy text, on a decoder graph. No harness is needed.

    context once -> mark -> continuation -> rewind -> another continuation of the same context ...

One sequence runs at a time, in steps whose logits are bounded. A graph with an exit layer
(`methods.predicted_kv.maps`) gives the logits of a prompt's last tokens alone. So it is scored as it is served: the
context is one prompt, and its continuation follows in steps of at most W + 1 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import NblError
from nbl_export.graph.names import MANIFEST
from nbl_export.methods.checkpoint.load import load_tokenizer
from nbl_export.targets import owner_of
from nbl_export.trust.contained import check_folder
from nbl_export.trust.model_settings import read_object

__all__ = ["GraphScorer", "Request", "TokenScores", "continuing_of", "graph_scorer"]

_LOGIT_BYTES = 1 << 28  # logits of one step, by far the largest array
_FEWEST_TOKENS = 64
_MOST_TOKENS = 1024  # larger steps are no faster on a CPU


@dataclass(frozen=True)
class Request:
    """Token ids: score `continuation` after `context`; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.context or not self.continuation:
            raise ValueError("context and continuation have at least one token")


@dataclass(frozen=True)
class TokenScores:
    """Of each token of a continuation: its log-likelihood in nats, and whether greedy decoding gives this token."""

    loglikelihoods: np.ndarray
    greedy: np.ndarray


class GraphScorer:
    """Scores on one decoder graph (`graph.decoder.OnnxDecoder`, or an object with the same methods).

    Args:
        decoder: must give logits of all positions.
        max_length: most tokens that the graph reads; longer requests lose their beginning.
        continuing: W of a graph with an exit layer; None without one.

    Raises:
        NblError: the graph gives logits of the last position only.
    """

    def __init__(self, decoder: Any, tokenizer: Any, max_length: int, continuing: int | None = None) -> None:
        self._decoder = decoder
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.continuing = continuing
        decoder.begin(1)
        logits_BTV = decoder.step(np.zeros((1, 2), np.int64))
        if logits_BTV.shape[1] != 2:
            raise NblError(
                "this graph gives logits of the last position only, and scores need the logits of all positions: keep "
                "all_logits.onnx beside the graph, or export with the key logits = 'all'"
            )
        most = _MOST_TOKENS if continuing is None else continuing + 1
        self._tokens = min(most, max(_FEWEST_TOKENS, _LOGIT_BYTES // (4 * int(logits_BTV.shape[2]))))

    def score(
        self, requests: Sequence[Request], progress: Callable[[int, int], None] = lambda _done, _total: None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy?) of each request, in order. Equal contexts are read once.

        Raises:
            NblError: a continuation is longer than `max_length`.
        """
        wanted = [self._fit(request) for request in requests]
        by_context: dict[tuple[int, ...], list[Request]] = {}
        for request in dict.fromkeys(wanted):
            by_context.setdefault(request.context, []).append(request)
        found: dict[Request, tuple[float, bool]] = {}
        for context, group in by_context.items():
            self._decoder.begin(1)
            last_V = self._read(context)
            mark = self._decoder.mark() if len(group) > 1 else None  # which may copy the caches
            for index, request in enumerate(group):
                if index:
                    self._decoder.rewind(mark)
                scores = self._behind(last_V, request.continuation)
                found[request] = float(scores.loglikelihoods.sum()), bool(scores.greedy.all())
            progress(len(found), len(set(wanted)))
        return [found[request] for request in wanted]

    def token_scores(self, request: Request) -> TokenScores:
        """Scores of the continuation's tokens; neither part of the request is shortened."""
        self._decoder.begin(1)
        return self._behind(self._read(request.context), request.continuation)

    def generate(self, prompt: Sequence[int], new_tokens: int, ended: Callable[[list[int]], bool]) -> list[int]:
        """The greedy continuation; it ends if `ended` is true of its ids, or at `new_tokens` tokens."""
        self._decoder.begin(1)
        last_V = self._read(prompt[-max(1, self.max_length - new_tokens) :])
        ids = list[int]()
        while True:
            ids.append(int(last_V.argmax()))
            if len(ids) == new_tokens or ended(ids):
                return ids
            last_V = self._decoder.step(np.array([ids[-1:]]))[0, -1]

    def _fit(self, request: Request) -> Request:
        """Shorten a long request: keep the whole continuation and the end of the context that still fits."""
        if len(request.continuation) > self.max_length:
            raise NblError(
                f"a continuation of {len(request.continuation)} tokens cannot be scored: the model reads "
                f"{self.max_length}; use shorter texts"
            )
        limits = self.max_length + 1 - len(request.continuation)
        return Request(request.context[-limits:], request.continuation)

    def _read(self, context: Sequence[int]) -> np.ndarray:
        """Begin with a context, in chunks or as one prompt; return the logits [V] of its last token."""
        most = self._tokens if self.continuing is None else len(context)
        for begin in range(0, len(context), most):
            last_V = self._decoder.step(np.array([context[begin : begin + most]]))[0, -1]
        return np.asarray(last_V)

    def _behind(self, last_V: np.ndarray, continuation: Sequence[int]) -> TokenScores:
        """Append a continuation to what the decoder has read, whose last logits are given."""
        parts = [_score(last_V[None], continuation[:1])]
        for begin in range(0, len(continuation) - 1, self._tokens):
            ids = continuation[begin : min(begin + self._tokens, len(continuation) - 1)]
            logits_TV = self._decoder.step(np.array([ids]))[0]
            parts.append(_score(logits_TV, continuation[begin + 1 : begin + 1 + len(ids)]))
        return TokenScores(*map(np.concatenate, zip(*parts, strict=True)))


def _score(logits_TV: np.ndarray, targets: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log softmax at the targets, in float64, and whether each target is the largest."""
    place = np.arange(len(targets)), np.asarray(targets, np.int64)
    top_T = logits_TV.max(1)
    log_sums_T = np.log(np.exp(logits_TV - top_T[:, None]).sum(1, dtype=np.float64))
    return logits_TV[place].astype(np.float64) - top_T - log_sums_T, logits_TV.argmax(1) == place[1]


def graph_scorer(directory: Path, threads: int | None = None, most: int | None = None) -> GraphScorer:
    """The decoder of a model directory; if there are two graphs, that with the logits of all positions.

    Args:
        most: tokens that are read at once; None means the model's positions.

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
    return GraphScorer(decoder, load_tokenizer(directory), positions, continuing_of(directory))


def continuing_of(directory: Path) -> int | None:
    """W of a model directory whose prompts stop below its highest layers; None for others."""
    path = directory / MANIFEST
    prompt_exit = read_object(path).get("exit") if path.is_file() else None
    return int(prompt_exit["recent_tokens"]) if prompt_exit else None
