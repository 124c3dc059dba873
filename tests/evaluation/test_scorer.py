"""Scores on a graph: against torch by hand, in every way a request can be computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import NblError
from nbl_export.evaluation.scorer import GraphScorer, Request, graph_scorer
from nbl_export.methods.linear.maps import Linear
from nbl_export.verify.ladder import TOLERANCES

from ..tiny import VOCAB

LIMIT = 2 * TOLERANCES["fp32"].limit  # a log softmax moves by at most twice what its logits move by


def ids(seed: int, length: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.random.default_rng(seed).integers(2, VOCAB, length))


CONTEXT = ids(0, 30)
REQUESTS = (
    Request(ids(1, 17), ids(2, 1)),
    Request(CONTEXT, ids(3, 5)),
    Request(CONTEXT, ids(4, 1)),
    Request(CONTEXT, ids(5, 9)),
    Request(ids(6, 100), ids(7, 3)),  # longer than a chunk of the small scorer below
    Request(ids(8, 1), ids(9, 20)),
    Request(ids(1, 17), ids(2, 1)),  # once more
)


@pytest.fixture(scope="module")
def scorers(genai_dirs: dict[str, Path]) -> dict[str, GraphScorer]:
    return {name: graph_scorer(path, 1, 512) for name, path in genai_dirs.items()}


@pytest.fixture(scope="module")
def models(
    checkpoint: Callable[[str], Path], random_maps: Callable[..., dict[int, Linear]]
) -> dict[str, Callable[[tuple[int, ...]], np.ndarray]]:
    """Variant -> log-probabilities [T, V] of the torch model."""
    import torch

    from nbl_export.methods.applied import linearize
    from nbl_export.methods.checkpoint.load import load_model

    def ask(model: Any) -> Callable[[tuple[int, ...]], np.ndarray]:
        def log_probabilities(tokens: tuple[int, ...]) -> np.ndarray:
            with torch.inference_mode():
                logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
            return np.asarray(logits.double().log_softmax(-1).numpy())

        return log_probabilities

    directory = checkpoint("llama")
    return {"original": ask(load_model(directory)), "nbl": ask(linearize(load_model(directory), random_maps(1)))}


def by_hand(model: Callable[[tuple[int, ...]], np.ndarray], request: Request) -> float:
    log_probabilities = model(request.context + request.continuation)
    start = len(request.context) - 1
    return float(sum(log_probabilities[start + k, token] for k, token in enumerate(request.continuation)))


@pytest.mark.parametrize("variant", ["original", "nbl"])
def test_scores_are_those_of_torch(
    variant: str, scorers: dict[str, GraphScorer], models: dict[str, Callable[[tuple[int, ...]], np.ndarray]]
) -> None:
    scorer = scorers[variant]
    for tokens in (scorer._tokens, 40):  # 40: chunks of the long request
        scorer._tokens = tokens
        for request, (score, _) in zip(REQUESTS, scorer.score(REQUESTS), strict=True):
            expected = by_hand(models[variant], request)
            assert abs(score - expected) <= LIMIT * len(request.continuation), request


def test_the_variants_differ_by_far_more_than_the_limit(scorers: dict[str, GraphScorer]) -> None:
    original, nbl = (scorers[name].score(REQUESTS) for name in ("original", "nbl"))
    assert min(abs(a - b) for (a, _), (b, _) in zip(original, nbl, strict=True)) > 10 * LIMIT


def test_a_request_that_is_too_long_loses_its_beginning(
    genai_dirs: dict[str, Path], scorers: dict[str, GraphScorer]
) -> None:
    short = graph_scorer(genai_dirs["nbl"], 1, 16)
    (exit_layer,) = short.score([Request(CONTEXT, ids(3, 5))])
    (same,) = scorers["nbl"].score([Request(CONTEXT[-12:], ids(3, 5))])
    assert exit_layer[0] == pytest.approx(same[0], abs=1e-4)
    with pytest.raises(NblError, match="17 tokens cannot be scored: the model reads 16"):
        short.score([Request(CONTEXT, ids(3, 17))])


def test_greedy_text_scores_as_greedy(scorers: dict[str, GraphScorer]) -> None:
    scorer = scorers["nbl"]
    prompts = [ids(1, 9), ids(2, 23), ids(3, 14)]
    texts = [scorer.generate(prompt, 6, lambda _: False) for prompt in prompts]
    assert [len(text) for text in texts] == [6, 6, 6]
    said = [Request(p, tuple(text)) for p, text in zip(prompts, texts, strict=True)]
    assert all(greedy for _, greedy in scorer.score(said))
    wrong = Request(said[0].context, (*said[0].continuation[:-1], (said[0].continuation[-1] + 1) % VOCAB))
    assert not scorer.score([wrong])[0][1]
    assert scorer.generate(prompts[0], 6, lambda text: len(text) == 2) == texts[0][:2]


def test_an_empty_request_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Request((1,), ())
