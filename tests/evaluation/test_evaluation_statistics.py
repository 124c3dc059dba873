"""Standard errors against the harness' own, against repetition, and on pairs."""

from __future__ import annotations

import numpy as np
import pytest

from nbl_export.evaluation.measure import AGGREGATIONS, aggregate_with_stderr, paired_difference

pytestmark = pytest.mark.engine

N, ROUNDS = 400, 3000


def draw(rng: np.random.Generator, aggregation: str, size: int = N) -> np.ndarray:
    if aggregation == "mean":
        return (rng.random(size) < 0.3).astype(float)
    losses = rng.gamma(4.0, 0.5, size)
    if aggregation == "perplexity":
        return -losses
    weights = rng.integers(20, 200, size).astype(float)
    return np.stack([-losses * weights, weights], 1)


def theirs(aggregation: str, items: np.ndarray) -> float:
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="lm-evaluation-harness is not installed")
    return float(getattr(metrics, aggregation)([tuple(row) if row.ndim else float(row) for row in items]))


@pytest.mark.parametrize("aggregation", list(AGGREGATIONS))
def test_values_are_the_harness_own(aggregation: str) -> None:
    items = draw(np.random.default_rng(0), aggregation)
    assert aggregate_with_stderr(aggregation, items)[0] == pytest.approx(theirs(aggregation, items), rel=1e-12)


def test_the_error_of_a_mean_is_the_harness_own() -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="lm-evaluation-harness is not installed")
    items = draw(np.random.default_rng(0), "mean")
    assert aggregate_with_stderr("mean", items)[1] == pytest.approx(metrics.mean_stderr(list(items)), rel=1e-12)


def test_one_item_has_no_error() -> None:
    assert aggregate_with_stderr("mean", [1.0]) == (1.0, None)


def test_items_that_are_not_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="3 items are not paired with 2"):
        paired_difference("mean", [1, 0, 1], [1, 0])
