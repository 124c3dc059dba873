"""Figures of lossless decoding from answers whose nanoseconds are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nbl_export.measure.speculative import Asked, Sample, Way, best_of_each, overall, rows
from nbl_export.records.capabilities import Proposer
from nbl_export.report.speed import speculative_table
from nbl_export.run.stages.speculative import measured, spoken

PLAIN = Way(None, "original")
NGRAM, INT4, NBL = (Proposer(draft, (("max_draft_tokens", 4),)) for draft in ("ngram", "int4", "nbl"))
FAST, EVEN, SLOW = (Way(proposer, "lossless") for proposer in (NGRAM, INT4, NBL))
WAYS = (PLAIN, SLOW, FAST, EVEN)  # the fastest is neither first nor last
TOKENS = (5, 6, 7, 8)

# Nanoseconds of a prompt and of an answer of four tokens. The whole answer takes 8000, 4000, 8000 and 16000.
PREFILL = {PLAIN: 2000, FAST: 2500, EVEN: 4000, SLOW: 4000}
DECODE = {PLAIN: 6000, FAST: 1500, EVEN: 4000, SLOW: 12000}


def answers(ways: tuple[Way, ...] = WAYS, loads: int = 5) -> list[Sample]:
    """An answer of each way to a prose and a code prompt in each load; code takes ten times as long."""
    return [
        Sample(way, Asked(kind, load, (1, 2)), load, answer(way, times))
        for load in range(1, loads + 1)
        for way in ways
        for kind, times in (("prose", 1), ("code", 10))
    ]


def answer(way: Way, times: int, tokens: tuple[int, ...] = TOKENS) -> SimpleNamespace:
    proposed, accepted, rounds = (0, 0, 0) if way is PLAIN else (8, 2, 2)
    return SimpleNamespace(
        tokens=tokens, prefill_ns=times * PREFILL[way], decode_ns=times * DECODE[way],
        proposed=proposed, accepted=accepted, rounds=rounds,
    )  # fmt: skip


def test_a_faster_way_has_a_ratio_above_one() -> None:
    found = {(row["proposer"], row["kind"]): row for row in (*rows(answers()), *overall(answers()))}
    assert len(found) == 3 * 3
    for kind in ("prose", "code", "all"):
        assert [found[way.name, kind]["ratio"] for way in (FAST, EVEN, SLOW)] == [2.0, 1.0, 0.5]
        verdicts = [found[way.name, kind]["verdict"] for way in (FAST, EVEN, SLOW)]
        assert verdicts == ["faster", "no clear difference", "slower"]
    one = found[FAST.name, "prose"]
    assert (one["decode_ratio"], one["prefill_ratio"]) == (4.0, 0.8)
    assert one["tokens_per_second"] == pytest.approx(4 / 1500e-9)
    assert one["plain_tokens_per_second"] == pytest.approx(4 / 6000e-9)
    assert (one["acceptance"], one["tokens_per_round"], one["prompts"], one["equal"]) == (0.25, 2.0, 5, 5)


def test_a_ratio_over_all_kinds_is_that_of_the_summed_times() -> None:
    """Prose is four times as fast, and code, which takes ten times as long, is not faster: 88 to 82 of 1000 ns."""
    samples = answers((PLAIN, EVEN))
    for sample in samples:
        if sample.way is EVEN and sample.asked.kind == "prose":
            sample.found.prefill_ns = sample.found.decode_ns = 1000
    (row,) = overall(samples)
    assert row["ratio"] == pytest.approx(88 / 82)


def test_an_answer_of_other_tokens_is_not_equal() -> None:
    samples = answers((PLAIN, FAST))
    samples[-1].found.tokens = (*TOKENS[:-1], 9)
    assert [(row["kind"], row["equal"]) for row in rows(samples)] == [("prose", 5), ("code", 4)]


def test_the_fastest_of_each_draft_is_kept() -> None:
    """By the whole answer: the second way decodes faster, and reads the prompt more slowly by more than that."""
    other = Way(Proposer("ngram", (("max_draft_tokens", 8),)), "lossless")
    samples = answers()
    for load in range(1, 6):
        times = SimpleNamespace(tokens=TOKENS, prefill_ns=50_000, decode_ns=1000, proposed=8, accepted=4, rounds=1)
        samples.append(Sample(other, Asked("prose", load, (1, 2)), load, times))
    assert set(best_of_each(samples)) == {PLAIN, FAST, EVEN, SLOW}


def test_the_fastest_is_chosen_and_pays_only_if_it_is_faster() -> None:
    trial = answers(loads=1)
    found = measured("auto", "fp32", trial, answers())
    assert found["chosen"] == NGRAM.to_json()
    assert found["pays"] is True
    assert [row["ratio"] for row in found["overall"]] == [2.0, 1.0, 0.5]
    assert {row["proposer"]: row["ratio"] for row in found["trial"]} == {FAST.name: 2, EVEN.name: 1, SLOW.name: 0.5}
    assert "×2.00 (2.00 to 2.00) of plain decoding" in spoken(found)
    idle = measured("auto", "fp32", trial, answers((PLAIN, SLOW, EVEN)))
    assert (idle["chosen"], idle["pays"]) == (INT4.to_json(), False)
    few = measured("auto", "fp32", trial, answers(loads=4))
    assert (few["chosen"], few["pays"]) == (NGRAM.to_json(), False)  # too few loads for a verdict


def test_the_table_shows_these_figures() -> None:
    table = speculative_table(measured("auto", "fp32", answers(loads=1), answers()))
    cells = {(row[0].text, row[1].text): tuple(cell.text for cell in row[2:]) for row in table.rows}
    assert len(cells) == 9
    assert cells[FAST.name, "all"] == ("25.0%", "2.00", "×0.80", "×4.00", "×2.00", "2.00 to 2.00", "10 of 10")
    assert cells[SLOW.name, "all"][3:] == ("×0.50", "×0.50", "0.50 to 0.50", "10 of 10")
    assert cells[EVEN.name, "all"][4:6] == ("no clear difference", "1.000 to 1.000")
