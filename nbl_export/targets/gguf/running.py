"""Runs a GGUF file in llama.cpp and compares it with the torch model: greedy tokens, and perplexity.

llama.cpp multiplies quantised matrices by activations of 8 bits, so its logits differ from torch's, and a near-tie can
fall either way. The original's file shows how much that is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nbl_export.records.results import CheckResult

__all__ = ["PROMPTS", "Answers", "Speaker", "hear", "judge"]

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "Once upon a time, a small fox",
    "The three primary colours are",
    "import numpy as np\n",
    "In the year 1969, the first",
    "To make a cup of tea, you need",
)
_NEW_TOKENS = 24
_WINDOWS, _WINDOW = 4, 256  # of the perplexity
_TIMES_THE_ORIGINAL = 2.0  # the NBL file's difference of the mean log-probability from torch's, of the original file's
_ERRORS = 3.0  # standard errors of this difference over the positions


@dataclass(frozen=True)
class Answers:
    """What a decoder says: greedy ids of each prompt; log-probabilities and likeliest ids of the windows' tokens."""

    greedy: tuple[tuple[int, ...], ...]
    logs: np.ndarray
    best: np.ndarray

    @property
    def perplexity(self) -> float:
        """Of all windows together."""
        return math.exp(-float(self.logs.mean()))


class Speaker(Protocol):
    """A decoder."""

    def greedy(self, ids: Sequence[int], new_tokens: int) -> Sequence[int]: ...

    def score(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]: ...


def hear(speaker: Speaker, prompts: Sequence[Sequence[int]], windows_WT: Any) -> Answers:
    """Ask a decoder for the greedy continuation of prompts, and for the probabilities of text."""
    said = tuple(tuple(int(i) for i in speaker.greedy(ids, _NEW_TOKENS)) for ids in prompts)
    rows = [speaker.score([int(i) for i in row[:_WINDOW]]) for row in windows_WT[:_WINDOWS]]
    logs, best = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return Answers(said, logs, best)


def judge(torch_original: Answers, original: Answers, torch_nbl: Answers, nbl: Answers) -> list[CheckResult]:
    """Compare what llama.cpp says with what torch says, for the original's file and for the NBL file.

    Tokens are reported. The perplexity is gated: its logarithm may differ from torch's by `_TIMES_THE_ORIGINAL` times
    the original file's difference, and `_ERRORS` standard errors of the difference at single positions.
    """
    own = abs(float((original.logs - torch_original.logs).mean()))
    apart = nbl.logs - torch_nbl.logs
    limits = {"original": None, "nbl": _TIMES_THE_ORIGINAL * own + _ERRORS * float(apart.std()) / len(apart) ** 0.5}
    pairs = {"original": (original, torch_original), "nbl": (nbl, torch_nbl)}
    return [result for subject, pair in pairs.items() for result in _compare(subject, *pair, limits[subject])]


def _compare(subject: str, ours: Answers, theirs: Answers, limit: float | None) -> list[CheckResult]:
    same = sum(a == b for a, b in zip(ours.greedy, theirs.greedy, strict=True))
    agree = float((ours.best == theirs.best).mean())
    away = abs(float((ours.logs - theirs.logs).mean()))
    said = f"{away:.2g} ({ours.perplexity:.4g} in llama.cpp, {theirs.perplexity:.4g} in torch)"
    passed = math.isfinite(away) and (limit is None or away <= limit)
    count = f"{same} of {len(ours.greedy)}"
    return [
        CheckResult("quantised", subject, "prompts whose greedy tokens are torch's", float(same), None, True, count),
        CheckResult(
            "quantised", subject, "positions with torch's likeliest token", agree, None, True, f"{100 * agree:.1f}%"
        ),
        CheckResult(
            "quantised", subject, "difference of the logarithm of perplexity from torch's", away, limit, passed, said
        ),
    ]
