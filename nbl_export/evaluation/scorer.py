"""Log-likelihoods of continuations, and greedy text, on a decoder graph. Token ids and numpy only.

    one continuation of a context        rows of similar length, right-padded, one step for each batch
    several of the same context          context once -> mark -> continuation -> rewind -> continuation ...
    a row too long for a batch           alone, in chunks
    a row of a graph with a cut          alone: the context as one prompt, then steps of at most W + 1 tokens

The second case computes one context and k continuations instead of k contexts. Continuations run one at a time,
because GroupQueryAttention accepts chunks after a cache for a single sequence only (ONNX Runtime 1.32). A graph with a
cut (`mixers.predicted`) gives the logits of a prompt's last tokens alone. So it is scored as it is served.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.errors import NblError

__all__ = ["GraphScorer", "Request", "TokenScores"]

_LOGIT_BYTES = 1 << 28  # logits of one step, by far the largest array
_FEWEST_TOKENS = 64
_MOST_TOKENS = 1024  # larger steps are no faster on a CPU
_MOST_ROWS = 16


@dataclass(frozen=True)
class Request:
    """Token ids: score `continuation` after `context`; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.context or not self.continuation:
            raise ValueError("context and continuation have at least one token")

    @property
    def inputs(self) -> tuple[int, ...]:
        """Tokens that the graph reads: all except the last token, which is only predicted."""
        return self.context + self.continuation[:-1]


@dataclass(frozen=True)
class TokenScores:
    """Of each token of a continuation: its log-likelihood in nats, and whether greedy decoding gives this token."""

    loglikelihoods: np.ndarray
    greedy: np.ndarray

    @property
    def total(self) -> tuple[float, bool]:
        """(log-likelihood, greedy?) of the continuation, as the harness wants a score."""
        return float(self.loglikelihoods.sum()), bool(self.greedy.all())

    @classmethod
    def joined(cls, parts: Sequence[TokenScores]) -> TokenScores:
        """The scores of parts that follow each other."""
        return cls(np.concatenate([p.loglikelihoods for p in parts]), np.concatenate([p.greedy for p in parts]))


class GraphScorer:
    """Scores on one decoder graph (`graph.decoder.OnnxDecoder`, or an object with the same methods).

    Args:
        decoder: must give logits of all positions.
        max_length: most tokens that the graph reads; longer requests lose their beginning.
        rows: most sequences of a batch.
        near: W of a graph with a cut; None without one.

    Raises:
        NblError: the graph gives logits of the last position only.
    """

    def __init__(
        self, decoder: Any, max_length: int, rows: int = _MOST_ROWS, near: int | None = None
    ) -> None:  # fmt: skip
        self._decoder = decoder
        self.max_length = max_length
        self.near, self.rows = near, rows if near is None else 1
        decoder.begin(1)
        logits_BTV = decoder.step(np.zeros((1, 2), np.int64))
        if logits_BTV.shape[1] != 2:
            raise NblError(
                "this graph gives logits of the last position only, and scores need the logits of all positions: keep "
                "all_logits.onnx beside the graph, export with the key logits = 'all', or evaluate the torch models "
                "(key variants = 'torch-original,torch-nbl')"
            )
        width = int(logits_BTV.shape[2])
        most = _MOST_TOKENS if near is None else near + 1
        self._tokens = min(most, max(_FEWEST_TOKENS, _LOGIT_BYTES // (4 * width)))

    # -- scores ----------------------------------------------------------------------------------------

    def score(
        self, requests: Sequence[Request], progress: Callable[[int, int], None] = lambda _done, _total: None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy?) of each request, in order; equal requests are computed once.

        Raises:
            NblError: a continuation is longer than `max_length`.
        """
        wanted = [self._fit(request) for request in requests]
        by_context: dict[tuple[int, ...], list[Request]] = {}
        for request in dict.fromkeys(wanted):
            by_context.setdefault(request.context, []).append(request)
        found: dict[Request, tuple[float, bool]] = {}
        shared = [group for group in by_context.values() if len(group) > 1]
        single = [group[0] for group in by_context.values() if len(group) == 1]
        for scores in itertools.chain(map(self._shared, shared), map(self._batch, self._batches(single))):
            found.update(scores)
            progress(len(found), len(set(wanted)))
        return [found[request] for request in wanted]

    def token_scores(self, request: Request) -> TokenScores:
        """Scores of the continuation's tokens; neither part of the request is shortened."""
        self._decoder.begin(1)
        if self.near is None:
            return TokenScores.joined(self._append(request.inputs, request.continuation))
        return self._behind(self._read(request.context)[-1], request.continuation)

    def _behind(self, last_V: np.ndarray, continuation: Sequence[int]) -> TokenScores:
        """Scores of a continuation of what the decoder has read, whose last logits are given."""
        parts = self._append(continuation[:-1], continuation[1:])
        return TokenScores.joined([_score(last_V[None], continuation[:1]), *parts])

    def _append(self, ids: Sequence[int], targets: Sequence[int]) -> list[TokenScores]:
        """Append a sequence whose last positions predict the targets; only the logits of one chunk are in memory."""
        first, parts = len(ids) - len(targets), []
        for begin in range(0, len(ids), self._tokens):
            logits_TV = self._decoder.step(np.array([ids[begin : begin + self._tokens]]))[0][max(0, first - begin) :]
            start = max(0, begin - first)
            parts.append(_score(logits_TV, targets[start : start + len(logits_TV)]))
        return parts

    def _fit(self, request: Request) -> Request:
        """Shorten a long request: keep the whole continuation and the end of the context that still fits."""
        if len(request.continuation) > self.max_length:
            raise NblError(
                f"a continuation of {len(request.continuation)} tokens cannot be scored: the model reads "
                f"{self.max_length}; use shorter texts"
            )
        limits = self.max_length + 1 - len(request.continuation)
        return Request(request.context[-limits:], request.continuation)

    def _shared(self, group: Sequence[Request]) -> dict[Request, tuple[float, bool]]:
        decoder = self._decoder
        decoder.begin(1)
        last_V = self._read(group[0].context)[-1]
        mark = decoder.mark()
        found = {}
        for request in group:
            decoder.rewind(mark)
            found[request] = self._behind(last_V, request.continuation).total
        return found

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Batches, longest rows first, so that a step too large for memory fails at once."""
        batch: list[Request] = []
        for request in sorted(requests, key=lambda r: (-len(r.inputs), r.inputs)):
            longest = len(batch[0].inputs) if batch else 0
            if batch and (len(batch) == self.rows or longest * (len(batch) + 1) > self._tokens):
                yield batch
                batch = []
            batch.append(request)
        if batch:
            yield batch

    def _batch(self, batch: Sequence[Request]) -> dict[Request, tuple[float, bool]]:
        if len(batch) == 1:
            return {batch[0]: self.token_scores(batch[0]).total}
        self._decoder.begin(len(batch))
        logits_BTV = self._decoder.step(*_right_padded([request.inputs for request in batch]))
        starts = [len(request.context) - 1 for request in batch]
        return {
            request: _score(rows_TV[start : start + len(request.continuation)], request.continuation).total
            for request, rows_TV, start in zip(batch, logits_BTV, starts, strict=True)
        }

    def _read(self, ids: Sequence[int]) -> np.ndarray:
        """Append one sequence, in chunks or as one prompt; return logits [n, V] of its last tokens."""
        if self.near is not None:
            return np.asarray(self._decoder.run(np.array([ids]))["logits"][0].astype(np.float32, copy=False))
        for begin in range(0, len(ids), self._tokens):
            logits_TV = self._decoder.step(np.array([ids[begin : begin + self._tokens]]))[0]
        return np.asarray(logits_TV)

    # -- text ------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, ended: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        """Greedy continuations as token ids; each ends if `ended` is true of its ids, or at `new_tokens` tokens."""
        limits = max(1, self.max_length - new_tokens)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        found: dict[int, list[int]] = {}
        for begin in range(0, len(order), self.rows):
            indices = order[begin : begin + self.rows]
            texts = self._continue([list(prompts[i])[-limits:] for i in indices], new_tokens, ended)
            found.update(zip(indices, texts, strict=True))
        return [found[i] for i in range(len(prompts))]

    def _continue(
        self, prompts: list[list[int]], new_tokens: int, ended: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        self._decoder.begin(len(prompts))
        if len(prompts) == 1:
            next_B = np.array([self._read(prompts[0])[-1].argmax()])
        else:
            logits_BTV = self._decoder.step(*_right_padded(prompts))
            next_B = np.array([row[len(p) - 1].argmax() for row, p in zip(logits_BTV, prompts, strict=True)])
        texts: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        while True:
            for b, token in enumerate(next_B):
                if not done[b]:
                    texts[b].append(int(token))
                    done[b] = len(texts[b]) == new_tokens or ended(texts[b])
            if all(done):
                return texts
            next_B = self._decoder.step(next_B[:, None])[:, -1].argmax(1)


def _right_padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids [B, T], and a mask [B, T] with 1 for tokens and 0 for padding."""
    ids_BT = np.zeros((len(rows), max(map(len, rows))), np.int64)
    valid_BT = np.zeros_like(ids_BT)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row)], valid_BT[b, : len(row)] = row, 1
    return ids_BT, valid_BT


def _score(logits_TV: np.ndarray, targets: Sequence[int]) -> TokenScores:
    """Log softmax at the targets, in float64."""
    place = np.arange(len(targets)), np.asarray(targets, np.int64)
    top_T = logits_TV.max(1)
    log_sums_T = np.log(np.exp(logits_TV - top_T[:, None]).sum(1, dtype=np.float64))
    per_token_T = logits_TV[place].astype(np.float64) - top_T - log_sums_T
    return TokenScores(per_token_T, logits_TV.argmax(1) == place[1])
