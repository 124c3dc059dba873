"""Retrieval items: rows that ask for facts of their own beginning, made without any data.

    facts, all alike ─► questions about six of them, each with its answer     the last tokens of a row
    "3f2a9c10": "77b0e1d2"                  Key "3f2a9c10" has the value "77b0e1d2"
                                                                          ^^^^^^^^ judged

pairs       hexadecimal keys and values (Liu et al. 2023, Lost in the Middle, arXiv 2307.03172)
variables   numbers, assigned more than once; the last value counts
sentences   who keeps what in which place; most names and most things stand in several sentences

Ordinary text asks for few facts, and few of them are alike. Decoders that skip work on a prompt fail here first
(Hsieh et al. 2024, RULER, arXiv 2404.06654).

Asked facts stand in the first third of a row, far behind the recent tokens of an exit layer. An answer stands once
among the facts. Rows of one seed and tokenizer are always equal.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nbl_export.text.corpus import Corpus
from nbl_export.text.windows import LONG_ROW, token_ids

if TYPE_CHECKING:
    import torch

__all__ = ["COUNTS", "KINDS", "RECIPE", "SHORTEST", "retrieval_parts", "retrieval_rows", "row_length"]

RECIPE: list[Any] = ["retrieval", 1]  # in the key of a stage that makes rows; another version has other rows
SHORTEST = 512  # tokens of a row; a shorter one has no room for many facts
_LONGEST = 4096
COUNTS = {"selection": 1, "validation": 6}  # rows of a kind by use, as text has uses (`text.windows`)
_QUESTIONS = 6  # of a row
_CUT = 2  # first facts, whose first tokens are cut for an exact length
_SYLLABLES = [a + b for a, b in itertools.product("bdfgklmnprstvz", "aeiou")]
_COLOURS = ("red", "blue", "green", "black")
_THINGS = ("lamp", "boat", "drum", "coat")

Facts = list[str]
Questions = list[tuple[str, str, str]]  # the words before an answer, the answer, and the words behind it


def _pairs(draw: random.Random, count: int) -> tuple[Facts, Questions]:
    words = _different(2 * count, lambda: f"{draw.getrandbits(32):08x}")
    facts = [f'"{key}": "{value}"' for key, value in zip(words[::2], words[1::2], strict=True)]
    asked = draw.sample(_asked(count), _QUESTIONS)
    return facts, [(f'Key "{words[2 * k]}" has the value "', words[2 * k + 1], '"') for k in asked]


def _variables(draw: random.Random, count: int) -> tuple[Facts, Questions]:
    names = _different(_QUESTIONS + count // 4, lambda: _word(draw, 2))
    values = _different(count, lambda: str(draw.randrange(100_000, 1_000_000)))
    assigned = draw.choices(names[_QUESTIONS:], k=count)
    places = sorted(draw.sample(_asked(count), 2 * _QUESTIONS))
    for k, place in enumerate(places):
        assigned[place] = names[k % _QUESTIONS]
    asked = draw.sample(places[_QUESTIONS:], _QUESTIONS)
    facts = [f"{name} = {value}" for name, value in zip(assigned, values, strict=True)]
    return facts, [(f"The last value of {assigned[k]} is ", values[k], "") for k in asked]


def _sentences(draw: random.Random, count: int) -> tuple[Facts, Questions]:
    things = [f"{colour} {thing}" for colour, thing in itertools.product(_COLOURS, _THINGS)]
    names = _different(math.ceil(count / 12), lambda: _word(draw, 2).capitalize())
    kept = draw.sample(list(itertools.product(names, things)), count)
    places = _different(count, lambda: _word(draw, 4).capitalize())
    told = [(f"{name} keeps the {thing} in ", place, ".") for (name, thing), place in zip(kept, places, strict=True)]
    return ["".join(parts) for parts in told], [told[k] for k in draw.sample(_asked(count), _QUESTIONS)]


KINDS: dict[str, Callable[[random.Random, int], tuple[Facts, Questions]]] = {
    "pairs": _pairs,
    "variables": _variables,
    "sentences": _sentences,
}
_FEWEST = {"pairs": 24, "variables": 42, "sentences": 24}  # facts whose first third has room for all that are asked


def row_length(context: int, positions: int) -> int:
    """Tokens of a row for windows of `context` tokens, as rows of text are joined; 0 if there is no room.

    Args:
        positions: of the model.
    """
    length = min(max(context, LONG_ROW), positions, _LONGEST)
    return length if length >= SHORTEST else 0


def retrieval_parts(tokenizer: Any, length: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """Rows by use and kind ("retrieval.validation.pairs"), each [rows, 2, length]; nothing if `length` is 0."""
    found = {
        f"retrieval.{use}.{kind}": retrieval_rows(tokenizer, kind, count, length, use, vocab_size)
        for kind in KINDS
        for use, count in COUNTS.items()
        if length
    }
    return {part: rows for part, rows in found.items() if len(rows)}


def retrieval_rows(tokenizer: Any, kind: str, count: int, length: int, seed: str, vocab_size: int) -> torch.Tensor:
    """Rows [count, 2, length] of one kind: token ids, and 1 for each token of an answer.

    No rows if the tokenizer needs more tokens than `length` for the fewest facts.

    Args:
        length: at least SHORTEST. vocab_size: of the model that reads the rows.

    Raises:
        NblError: the tokenizer fails, or has tokens that the model lacks.
    """
    import torch

    def ids_of(text: str) -> list[int]:
        return token_ids(Corpus("retrieval items", "", (text,)), tokenizer, 1, vocab_size)

    found = [_row(ids_of, kind, length, f"{seed} {kind} {k}") for k in range(count)]
    return torch.tensor([row for row in found if row], dtype=torch.long).view(-1, 2, length)


def _row(ids_of: Callable[[str], list[int]], kind: str, length: int, seed: str) -> list[list[int]]:
    """Token ids and answers of one row, with as few facts as give its length; empty if there is no room."""
    count = _FEWEST[kind]
    text, spans = _text(kind, seed, count)
    if len(ids_of(text)) > length:
        return []
    while len(ids := ids_of(text)) < length:
        if count >= length:
            return []
        count = max(count + 1, count * length // max(1, len(ids)))
        text, spans = _text(kind, seed, count)
    answers = [0] * len(ids)
    for span in spans:
        first, last = (_common(ids, ids_of(text[:place])) for place in span)
        answers[first:last] = [1] * (last - first)
    return [ids[-length:], answers[-length:]]


def _text(kind: str, seed: str, count: int) -> tuple[str, list[tuple[int, int]]]:
    """The text of a row of so many facts, and where its answers begin and end, in characters."""
    facts, questions = KINDS[kind](random.Random(seed), count)
    text = "".join(f"{fact}\n" for fact in facts) + "\n"
    spans = list[tuple[int, int]]()
    for before, answer, behind in questions:
        text += before
        spans.append((len(text), len(text) + len(answer)))
        text += f"{answer}{behind}\n"
    return text, spans


def _common(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many first tokens two texts have in common."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False))
    return len(list(same))


def _asked(count: int) -> range:
    """The facts that may be asked, of so many."""
    return range(_CUT, count // 3)


def _word(draw: random.Random, syllables: int) -> str:
    return "".join(draw.choices(_SYLLABLES, k=syllables))


def _different(count: int, make: Callable[[], str]) -> list[str]:
    """So many words, no two of them alike."""
    words: dict[str, None] = {}
    while len(words) < count:
        words[make()] = None
    return list(words)
