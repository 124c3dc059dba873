"""The prompts and the figures of lossless.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nbl_export.measure.benchmark import where_measured
from nbl_export.measure.lossless import (
    Asked,
    Sample,
    decoding,
    equal_answers,
    overall,
    rows,
)
from nbl_export.records.proposers import MOST_ROWS, Proposer
from nbl_export.text.prompts import prompts

__all__ = ["LOADS", "NEW_TOKENS", "asked_of", "measured", "spoken"]

NEW_TOKENS = 64
LOADS = 5  # after the trial, which is load 0
_MOST_PROMPT_TOKENS = 512


def asked_of(runner: Any, most: int, loads_wanted: int) -> list[list[Asked]]:
    """The prompts of each load, one of each kind, as token ids of at most `most` tokens, and of 512."""
    loads: list[list[Asked]] = [[] for _ in range(loads_wanted)]
    counts: dict[str, int] = {}
    for prompt in prompts(loads_wanted):
        number = counts[prompt.kind] = counts.get(prompt.kind, -1) + 1
        ids = runner.encode(prompt.text, chat=prompt.chat)
        loads[number].append(Asked(prompt.kind, number, tuple(ids[: min(most, _MOST_PROMPT_TOKENS)])))
    return loads


def measured(draft: str, precision: str, trial: Sequence[Sample], samples: Sequence[Sample]) -> dict[str, Any]:
    """The figures of lossless.json: the trial, the rows, and the fastest proposer.

    `pays` says whether the fastest proposer is faster than plain decoding, by its whole interval.
    """
    best = sorted(overall(samples), key=lambda row: -row["ratio"])
    chosen = _named(samples, best[0]["proposer"])
    return {
        "asked": draft,
        "precision": precision,
        "chosen": chosen.to_json(),
        "pays": best[0]["verdict"] == "faster",
        "new_tokens": NEW_TOKENS,
        "verified_positions": MOST_ROWS,
        "trial": [{"proposer": row["proposer"], "ratio": row["ratio"]} for row in overall(trial)],
        "overall": best,
        "rows": rows(samples),
        **where_measured(),
    }


def _named(samples: Sequence[Sample], name: str) -> Proposer:
    return next(s.way.proposer for s in samples if s.way.proposer is not None and s.way.name == name)


def spoken(result: Mapping[str, Any]) -> str:
    """The outcome in a sentence."""
    best = result["overall"][0]
    interval = f"×{best['ratio']:.2f} ({best['low']:.2f} to {best['high']:.2f})"
    kind, equal = decoding(result["precision"]), f"{equal_answers(best)} equal"
    if result["pays"]:
        return f"{kind} with {best['proposer']}: {interval} of plain decoding, {equal}"
    return f"{kind} does not pay here: the fastest, {best['proposer']}, is {interval} of plain decoding, {equal}"
