"""Which rows of each stream the last token needs, counted by hand and by brute force."""

from __future__ import annotations

import pytest

from nbl_export.methods.rows import ATTENTION_READS, Need, Read, Reads, Rows, lowest_stream, rows_needed

LINEAR: Reads = (Read(),)
ALL, LAST = Need(None), Need(1)


def first_and(last: int) -> Need:
    return Need(last, first=True)


def keys_from(stream: int, tokens: int = 1) -> Reads:
    return (Read(rows=Rows.LAST, tokens=tokens), Read(stream, Rows.ALL))


CASES: dict[str, tuple[dict[int, Reads], tuple[Need, ...]]] = {
    "attention everywhere": ({}, (ALL, ALL, ALL, LAST)),
    "a linear layer at the top": ({2: LINEAR}, (ALL, ALL, LAST, LAST)),
    "a linear layer below attention": ({1: LINEAR}, (ALL, ALL, ALL, LAST)),
    "keys from the stream below": ({1: keys_from(0), 2: keys_from(0)}, (ALL, LAST, LAST, LAST)),
    "keys from an earlier stream, 8 rows exact": ({2: keys_from(1, 8)}, (ALL, ALL, first_and(8), LAST)),
    "keys at an exit layer of 1, then its own": (
        {1: keys_from(1, 8), 2: keys_from(1, 8)},
        (ALL, ALL, first_and(8), LAST),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_counted_by_hand(case: str) -> None:
    reads, needs = CASES[case]
    assert rows_needed(reads, 3) == needs


def reached(reads: dict[int, Reads], layers: int, tokens: int) -> list[set[int]]:
    """Rows of each stream on which the last row depends, followed row by row."""
    found = [set[int]() for _ in range(layers)] + [{tokens - 1}]
    for layer in reversed(range(layers)):
        for row in found[layer + 1]:
            found[layer].add(row)
            for read in reads.get(layer, ATTENTION_READS):
                stream = layer if read.stream is None else read.stream
                if read.rows is Rows.ALL:
                    found[stream] |= set(range(tokens))
                elif read.tokens > 1:
                    found[stream] |= {0, *range(max(0, tokens - read.tokens), tokens)}
    return found


@pytest.mark.parametrize("tokens", [1, 3, 5, 9, 40])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_that_are_followed_row_by_row(case: str, tokens: int) -> None:
    reads = CASES[case][0]
    counts = [need.count(tokens) for need in rows_needed(reads, 3)]
    assert counts == [len(rows) for rows in reached(reads, 3, tokens)]


def test_the_lowest_stream_is_that_of_the_lowest_read() -> None:
    assert lowest_stream({2: keys_from(1)}) == 1
    assert lowest_stream({2: LINEAR, 4: ATTENTION_READS}) == 2
