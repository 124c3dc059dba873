"""Quality at length: loss by position, retrieval of a key, and copying, in windows of a long context.

    position     t t t t t t ... t                            loss of tokens 1-127, 128-255, ..., 2048-4095
    retrieval    text | pass key | text | question | key      loss of the key, which first stands in the first half
    copying      r r r r r r | r r r r r r                    loss of the second half: the same random tokens again

Retrieval and copying are measured in 512 tokens and in a full window. Retrieval is that of a pass key (Mohtashami and
Jaggi 2023, Landmark Attention), in the user's own text. Copying of random tokens is what induction heads do (Olsson et
al. 2022, In-context Learning and Induction Heads). A key is correct if greedy decoding gives all of its digits. In the
other tests, each token counts.

Keys, places and random tokens come from fixed seeds. So all models get the same items.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.errors import NblError
from nbl_export.evaluation.measure import Metric, Outcome, windows
from nbl_export.evaluation.scorer import GraphScorer, Request
from nbl_export.records.quality import SHORT_TEXT
from nbl_export.text.corpus import Corpus

__all__ = ["COPYING", "OF_TEXT", "TESTS", "run_length"]

OF_TEXT = POSITION, RETRIEVAL = "position", "retrieval"
COPYING = "copying"
TESTS = (*OF_TEXT, COPYING)

_FIRST = 128  # tokens of the first part of a window; each following part ends at twice as many
_ITEMS = 8  # keys, or random sequences, of each length: without a limit, and at most
_MOST = 16
_SEED = 0
_NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
_QUESTION = "\n\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class _Item:
    """Token ids whose last tokens are scored, in parts: ends (a name for each part), counts of tokens."""

    ids: tuple[int, ...]
    ends: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def request(self) -> Request:
        first = len(self.ids) - sum(self.counts)
        return Request(self.ids[:first], self.ids[first:])


def run_length(
    test: str,
    text: Corpus | None,
    scorer: GraphScorer,
    window: int,
    limit: int | None,
    progress: Callable[[int, int], None],
    *,
    behind_prompt: bool = False,
) -> Outcome:
    """One of `TESTS` on a model: mean loss in nats and share of correct tokens or keys, for each position or length.

    Args:
        text: None for copying.
        window: tokens of a window of the text, and of the longest item.
        limit: most windows, or keys or sequences of each length, of these at most 16.
        behind_prompt: of a window, the first half is a prompt, and only the last position range is scored.

    Raises:
        NblError: the text is shorter than one window, or a window has no room for a key.
    """
    few = limit if test == POSITION else min(limit or _ITEMS, _MOST)
    rows = windows(text, scorer.tokenizer, window, few) if text else []
    items = list(_items(test, rows, scorer.tokenizer, window, few or 0))
    if behind_prompt and test == POSITION:
        items = [_Item(item.ids, item.ends[-1:], item.counts[-1:]) for item in items]
    found: dict[str, list[float]] = {}
    for done, item in enumerate(items, 1):
        scores = scorer.token_scores(item.request)
        bounds = np.cumsum(item.counts)[:-1]
        parts = zip(np.split(scores.loglikelihoods, bounds), np.split(scores.greedy, bounds), strict=True)
        for end, (loss, greedy) in zip(item.ends, parts, strict=True):
            found.setdefault(f"loss {end}", []).append(-float(loss.mean()))
            correct = greedy.all() if test == RETRIEVAL else greedy.mean()
            found.setdefault(f"correct {end}", []).append(float(correct))
        progress(done, len(items))
    metrics = {k: Metric.of("mean", v, higher_is_better=k.startswith("correct")) for k, v in found.items()}
    return Outcome(len(next(iter(found.values()))), metrics)


def _items(test: str, rows: list[list[int]], tokenizer: Any, window: int, count: int) -> Iterator[_Item]:
    if test == POSITION:
        ends = (*(_FIRST << k for k in range(window.bit_length()) if _FIRST << k < window), window)
        counts = tuple(b - a for a, b in itertools.pairwise((1, *ends)))  # nothing predicts the first token
        yield from (_Item(tuple(row), ends, counts) for row in rows)
        return
    for length, index in itertools.product(sorted({min(SHORT_TEXT, window), window}), range(count)):
        rng = np.random.default_rng((_SEED, length, index))
        if test == RETRIEVAL:
            depth = (index + 0.5) / count / 2  # in the first half
            yield _key(rows[index % len(rows)], tokenizer, length, int(rng.integers(10_000, 100_000)), depth)
        else:
            yield _copy(tokenizer, length, rng)


def _key(row: list[int], tokenizer: Any, length: int, key: int, depth: float) -> _Item:
    """A text of `length` tokens with a key at a depth from 0 to 1, and the question for the key."""

    def encoded(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    needle = encoded(_NEEDLE.format(key=key))
    asked = encoded(f"{_QUESTION} {key}")
    other = encoded(f"{_QUESTION} {key + 10_000 if key < 50_000 else key - 10_000}")  # another first digit
    same = next(i for i, (a, b) in enumerate(zip(asked, other, strict=False)) if a != b)
    question = asked[:same]
    answer = asked[same:]
    text = row[: max(0, length - len(needle) - len(question) - len(answer))]
    if len(text) < length // 2:
        raise NblError(f"{length} tokens have no room for text and a pass key; give a larger --ppl-context")
    place = int(depth * len(text))
    ids = (*text[:place], *needle, *text[place:], *question, *answer)
    return _Item(ids, (length,), (len(answer),))


def _copy(tokenizer: Any, length: int, rng: np.random.Generator) -> _Item:
    """Random tokens twice; nothing predicts the first token of the second half."""
    begin = tokenizer("", verbose=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    vocabulary = np.array([i for i in range(len(tokenizer)) if i not in special])
    half = [int(i) for i in rng.choice(vocabulary, (length - len(begin)) // 2)]
    return _Item((*begin, *half, *half), (length,), (len(half) - 1,))
