"""What is said of a GGUF file that runs: tokens are counted, and a perplexity that is off fails."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from nbl_export.targets.gguf.check import PROMPTS, Answers, hear, judge

RNG = np.random.default_rng(0)
LOGS = -RNG.exponential(3.0, 1000)


def heard(logs: np.ndarray, token: int = 1) -> Answers:
    return Answers(((token, 2),) * len(PROMPTS), logs, np.full(len(logs), token))


class Told:
    """A decoder that says the length of what it was given."""

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        return [len(ids)] * new_tokens

    def score(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return -np.ones(len(ids) - 1), np.asarray(ids[1:])


def test_hear_asks_for_prompts_and_four_windows() -> None:
    found = hear(Told(), [[1, 2], [3]], np.arange(6 * 300).reshape(6, 300))
    assert found.greedy == ((2,) * 24, (1,) * 24)
    assert found.logs.shape == found.best.shape == (4 * 255,) and found.best[0] == 1
    assert found.perplexity == pytest.approx(np.e)


@pytest.mark.parametrize(("shift", "passed"), [(0.0, True), (0.01, True), (0.06, False), (-0.06, False)])
def test_the_perplexity_may_differ_by_noise_and_what_the_original_differs(shift: float, passed: bool) -> None:
    noise = RNG.normal(0, 0.2, (2, 1000))
    noise -= noise.mean(1, keepdims=True)
    results = judge(heard(LOGS), heard(LOGS + noise[0] + 0.005), heard(LOGS), heard(LOGS + noise[1] + shift))
    gated = [r for r in results if r.tolerance is not None]
    assert [(r.subject, r.passed) for r in gated] == [("nbl", passed)]
    assert gated[0].value == pytest.approx(abs(shift), abs=1e-9) and "in llama.cpp" in gated[0].detail


def test_tokens_are_counted() -> None:
    results = judge(heard(LOGS), heard(LOGS), heard(LOGS), heard(LOGS, token=5))
    counts = {(r.subject, r.metric): r.value for r in results if r.tolerance is None}
    assert counts["original", "prompts whose greedy tokens are torch's"] == len(PROMPTS)
    assert counts["nbl", "prompts whose greedy tokens are torch's"] == 0
    assert counts["nbl", "positions with torch's likeliest token"] == 0


def test_what_is_not_finite_fails() -> None:
    results = judge(heard(LOGS), heard(LOGS), heard(LOGS), heard(np.full(1000, np.nan)))
    assert [(r.subject, r.passed) for r in results if not r.passed] == [("nbl", False)]
    assert len(results) == 6
