"""Retrieval items are what their rules say, for tokenizers of different kinds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.text.retrieval import COUNTS, KINDS, SHORTEST, retrieval_parts, retrieval_rows, row_length

from ..tiny import VOCAB, tiny_tokenizer


class Pieces:
    """Letters and digits in runs of at most three, each other character alone; ids are those of first use."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        pieces = re.findall(r"[A-Za-z0-9]{1,3}|[^A-Za-z0-9]", text)
        return {"input_ids": [self.known.setdefault(piece, len(self.known)) for piece in pieces]}

    def decode(self, ids: list[int]) -> str:
        return "".join(list(self.known)[token] for token in ids)


TOKENIZERS: dict[str, tuple[Callable[[], Any], int]] = {"pieces": (Pieces, 1 << 20), "bytes": (tiny_tokenizer, VOCAB)}


def made(name: str, kind: str, length: int, count: int = 3, seed: str = "a") -> tuple[Any, torch.Tensor]:
    make, vocab_size = TOKENIZERS[name]
    tokenizer = make()
    return tokenizer, retrieval_rows(tokenizer, kind, count, length, seed, vocab_size)


def read(tokenizer: Any, row_2T: torch.Tensor) -> tuple[str, str, list[str]]:
    """Facts and questions of a row, and the text of each run of tokens that answers."""
    ids, answers = row_2T.tolist()
    facts, questions = tokenizer.decode(ids).split("\n\n")
    runs = itertools.groupby(zip(ids, answers, strict=True), key=lambda pair: pair[1])
    return facts, questions, [tokenizer.decode([token for token, _ in run]) for judged, run in runs if judged]


def fact_of(kind: str, question: str, facts: str) -> list[re.Match[str]]:
    """The facts that a question asks for, in their order; group 1 is the answer."""
    if kind == "pairs":
        key = question.split('"')[1]
        return list(re.finditer(rf'"{key}": "(\w+)"', facts))
    if kind == "variables":
        name = question.removeprefix("The last value of ").split(" is ")[0]
        return list(re.finditer(rf"(?m)^{name} = (\d+)$", facts))
    return list(re.finditer(rf"(?m)^{re.escape(question.rsplit(' ', 1)[0])} (\w+)\.$", facts))


@pytest.mark.parametrize("length", [1024, 2048])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_each_question_asks_for_one_early_fact_whose_answer_stands_once(name: str, kind: str, length: int) -> None:
    tokenizer, rows = made(name, kind, length)
    assert rows.shape == (3, 2, length) and rows.dtype == torch.long
    for row_2T in rows:
        facts, questions, answers = read(tokenizer, row_2T)
        asked = questions.splitlines()
        assert len(asked) == len(answers) == 6
        for question, answer in zip(asked, answers, strict=True):
            found = fact_of(kind, question, facts)
            assert len(found) >= 2 if kind == "variables" else len(found) == 1
            last = found[-1]
            assert last[1] == answer.strip(' "') and facts.count(last[1]) == 1
            assert last.end() < 0.4 * len(facts)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_stand_in_no_order_that_tells_the_place(kind: str) -> None:
    tokenizer, rows = made("pieces", kind, 1024)
    for row_2T in rows:
        facts, _, _ = read(tokenizer, row_2T)
        found = re.findall(r"(?m)(\w+)\W*$", facts)
        assert len(found) >= 24 and found[2:] not in (sorted(found[2:]), sorted(found[2:], reverse=True))


def test_a_name_or_a_thing_alone_rarely_tells_the_place() -> None:
    tokenizer, rows = made("pieces", "sentences", 1024, count=8)
    counts = []
    for row_2T in rows:
        facts, questions, _ = read(tokenizer, row_2T)
        for question in questions.splitlines():
            name, _, _, colour, thing, *_ = question.split()
            counts += [facts.count(f"{name} keeps the"), facts.count(f"the {colour} {thing}")]
    assert sum(count > 1 for count in counts) >= 0.95 * len(counts)


def test_the_judged_tokens_are_those_that_the_tokenizer_gives_in_place() -> None:
    """Behind a space, a word of this tokenizer begins with the space."""

    class Spaced(Pieces):
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            pieces = re.findall(r" ?[A-Za-z0-9]+|.|\n", text)
            return {"input_ids": [self.known.setdefault(piece, len(self.known)) for piece in pieces]}

    tokenizer = Spaced()
    (row_2T,) = retrieval_rows(tokenizer, "sentences", 1, 1024, "a", 1 << 20)
    _, questions, answers = read(tokenizer, row_2T)
    assert answers == [f" {line.rsplit(' ', 1)[1][:-1]}" for line in questions.splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_length_cuts_no_asked_fact(kind: str) -> None:
    tokenizer, rows = made("pieces", kind, 1024, count=40)
    for row_2T in rows:
        facts, _, answers = read(tokenizer, row_2T)
        assert all(facts.count(answer) == 1 for answer in answers)


def test_rows_follow_from_seed_and_tokenizer_alone() -> None:
    one, again, other = (made("pieces", "variables", 700, seed=seed)[1] for seed in "aab")
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert len({tuple(row.flatten().tolist()) for row in torch.cat([one, other])}) == 6


def test_rows_of_each_use_and_kind_are_others() -> None:
    """What was chosen by some rows is not judged by the same ones."""
    found = retrieval_parts(Pieces(), 700, 1 << 20)
    assert {part: len(rows) for part, rows in found.items()} == {
        f"retrieval.{use}.{kind}": count for use, count in COUNTS.items() for kind in KINDS
    }
    rows = [tuple(row.flatten().tolist()) for rows in found.values() for row in rows]
    assert len(set(rows)) == len(rows)
    assert retrieval_parts(Pieces(), 0, 1 << 20) == {}


@pytest.mark.parametrize(
    ("context", "positions", "length"),
    [(64, 8192, 1024), (2048, 8192, 2048), (8192, 32_768, 4096), (2048, 700, 700), (64, 512, 512), (64, 511, 0)],
)
def test_a_row_is_as_long_as_joined_rows_of_text_and_no_longer_than_the_model_reads(
    context: int, positions: int, length: int
) -> None:
    assert row_length(context, positions) == length


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_with_too_many_tokens_a_fact_gives_no_rows(kind: str) -> None:
    def letters(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    assert retrieval_rows(letters, kind, 2, SHORTEST, "a", 128).shape == (0, 2, SHORTEST)
    assert retrieval_rows(letters, kind, 2, 8 * SHORTEST, "a", 128).shape == (2, 2, 8 * SHORTEST)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(NblError, match="retrieval items, and the model has 5"):
        retrieval_rows(Pieces(), "pairs", 1, SHORTEST, "a", 5)
