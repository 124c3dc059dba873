"""Are the greedy tokens of lossless decoding the original's?

Two chunk lengths take different kernels, so logits differ by rounding, and near-ties fall either way. A difference
passes if the original's two best logits are closer there than the precision's `greedy_margin`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nbl_export.measure.lossless import PLAIN, Sample
from nbl_export.records.results import RungResult
from nbl_export.verify.ladder import TOLERANCES

__all__ = ["check_tokens", "first_differences", "margin"]


def first_differences(samples: Sequence[Sample], margin_of: Callable[[Sequence[int]], float]) -> list[dict[str, Any]]:
    """Where answers leave the plain ones, and how close the original's two best logits are there.

    Args:
        margin_of: token ids -> the difference of the original's two best logits behind them.
    """
    plain = {(s.load, s.asked): s.found.tokens for s in samples if s.way.name == PLAIN}
    found = []
    for sample in samples:
        ours, theirs = sample.found.tokens, plain[sample.load, sample.asked]
        if ours == theirs:
            continue
        pairs = enumerate(zip(ours, theirs, strict=False))
        at = next((k for k, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        margin = margin_of([*sample.asked.ids, *theirs[:at]])
        where = {"kind": sample.asked.kind, "prompt": sample.asked.number, "token": at, "of": len(theirs)}
        found.append({"proposer": sample.way.name, **where, "margin": margin})
    return found


def check_tokens(samples: Sequence[Sample], differences: Sequence[dict[str, Any]], precision: str) -> RungResult:
    """Whether all greedy tokens are the original's, near-ties aside."""
    allowed = TOLERANCES[precision].greedy_margin
    answers = sum(s.way.name != PLAIN for s in samples)
    worst = max((d["margin"] for d in differences), default=0.0)
    detail = f"{answers - len(differences)} of {answers} answers are equal"
    if differences:
        detail += f"; the others differ first where two logits are at most {worst:.2g} apart"
    metric = "greedy tokens of the original: largest margin at a difference"
    return RungResult("d", "lossless", metric, worst, allowed, worst <= allowed, detail)


def margin(runner: Any, ids: Sequence[int]) -> float:
    """The difference of a decoder's two best logits behind some tokens."""
    runner.begin(len(ids))
    runner.append(ids)
    second, first = np.partition(runner.last_logits(), -2)[-2:]
    return float(first - second)
