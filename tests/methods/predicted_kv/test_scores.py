"""Scores on a graph with an exit layer: a context is one prompt that stops there, and its continuation is scored
whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.evaluation.lm import OnnxLM
from nbl_export.evaluation.scorer import GraphScorer, Request, continuing_of
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.names import ALL_LOGITS_FILE
from nbl_export.graph.passes.tail import keep_last_token
from nbl_export.methods.predicted_kv.maps import PredictedKV
from nbl_export.methods.rewrite import rewrite
from tests.tiny import HEAD_DIM, HIDDEN, KV_HEADS, VOCAB

W = 4
IDS = tuple(np.random.default_rng(0).integers(2, VOCAB, 40).tolist())


@pytest.fixture(scope="module")
def exit_directory(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, out = np.random.default_rng(1), tmp_path_factory.mktemp("exit") / "model"
    wide = 2 * KV_HEADS * HEAD_DIM
    maps = {
        layer: PredictedKV(rng.normal(0, 0.2, (wide, 2 * HIDDEN)).astype("f"), np.zeros(wide, "f"), HIDDEN, 1, W, 1e-2)
        for layer in (1, 2)
    }
    rewrite(exported("llama"), out, maps)
    keep_last_token(out)
    (out / "nbl.json").write_text(json.dumps({"exit": {"layer": 1, "recent_tokens": W}}), encoding="utf-8")
    return out


def opened(directory: Path) -> OnnxDecoder:
    return OnnxDecoder(directory, HEAD_DIM, file=ALL_LOGITS_FILE)


def expected(decoder: Any, ids: Sequence[int], context: int) -> list[float]:
    """The prompt in one step, then one token at a time."""
    decoder.begin(1)
    logits, found = decoder.step(np.array([ids[:context]]))[0, -1], []
    for token in ids[context:]:
        found.append(float(logits[token] - np.log(np.exp(logits.astype(np.float64)).sum())))
        logits = decoder.step(np.array([[token]]))[0, -1]
    return found


@pytest.mark.parametrize("context", [3, 20])
@pytest.mark.parametrize("count", [1, 12])
def test_a_continuation_is_scored_as_it_is_served(exit_directory: Path, context: int, count: int) -> None:
    scorer = GraphScorer(opened(exit_directory), None, 512, W)
    request = Request(IDS[:context], IDS[context : context + count])
    right = expected(opened(exit_directory), IDS[: context + count], context)
    np.testing.assert_allclose(scorer.token_scores(request).loglikelihoods, right, atol=1e-5)
    other = Request(IDS[:context], (7,))  # a second one of the same context
    (total, _), _, _ = scorer.score([request, other, Request(IDS[1:9], IDS[9:11])])
    assert total == pytest.approx(sum(right), abs=1e-4)


@pytest.mark.trt
def test_a_graph_with_caches_of_fixed_length_is_scored_as_it_is_served() -> None:
    from tests.static_tiny import open_decoder, rows
    from tests.trt_tiny import graph_of

    path, ids = graph_of("llama", (), "fp32", exit_layer=(1, 8)) / ALL_LOGITS_FILE, tuple(rows()[0][:56])
    found = GraphScorer(open_decoder(path, 64), None, 96, 8).token_scores(Request(ids[:20], ids[20:]))
    np.testing.assert_allclose(found.loglikelihoods, expected(open_decoder(path, 64), ids, 20), atol=1e-5)


def test_the_width_is_that_of_the_directory(exit_directory: Path, exported: Any) -> None:
    assert continuing_of(exit_directory) == W and continuing_of(exported("llama")) is None
    assert OnnxLM(path=str(exit_directory)).scorer.continuing == W
