"""The result of a run in a few lines: figures of the report, and a verdict on the loss by the user's goal."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from nbl_export.report.document import markdown
from nbl_export.report.outcome import (
    Timed,
    faster_runtime,
    judged,
    limit_of,
    next_steps,
    outcome,
    verdict,
    worst_long_range,
)
from nbl_export.report.page import document, summarize

from .test_report import BENCH, MANIFEST, VERIFY


def report(**changes: Any) -> dict[str, Any]:
    return {**summarize(copy.deepcopy(MANIFEST), copy.deepcopy(VERIFY), copy.deepcopy(BENCH)), **changes}


def test_each_line_has_its_figures() -> None:
    noisy = "Not shown to be worth it: the measurement is noisy."
    assert outcome(report()) == (
        ("verdict", f"{noisy} Loses: perplexity +25% (18 to 32), above the limit of 5% (the default)."),
        ("layers", "3 of 6 replaced: 0, 2-3"),
        ("TTFT", "prompt of 512 tokens: 2,510 ms → 1,520 ms, 2.00× (1.25 to 3.00), noisy"),
        ("decode", "128 new tokens: 20.0 ms → 10.0 ms, no clear difference (0.80 to 1.25); "
                   "128 new tokens behind 64: 0.50× (0.25 to 0.50), noisy"),
        ("KV cache", "−50.0%, 4.00 KiB to 2.00 KiB a token"),
        ("loss", "perplexity +25% (18 to 32) on held-back calibration"),
        ("", "above the limit of 5% (the default)"),
    )  # fmt: skip


def test_nothing_is_said_of_what_was_not_measured() -> None:
    lines = dict(outcome(report(ratios=[], quality_loss=[], replaced_layers=[])))
    assert (lines["layers"], lines["TTFT"], lines["loss"]) == ("0 of 6 replaced", "not measured", "not measured")


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        ({"max_perplexity_increase": "10%", "default": False}, ("above", "10%")),
        ({"max_perplexity_increase": "30%", "default": False}, ("undecided", "30%")),
        ({"max_perplexity_increase": "32.4%", "default": False}, ("within", "32.4%")),
        ({"max_perplexity_increase": "40%", "default": True}, ("above", "5% (the default)")),
        ({"max_perplexity_increase": "much", "default": False}, ("above", "5% (the default)")),
        (None, ("above", "5% (the default)")),
    ],
)
def test_the_loss_is_judged_by_the_goal(goal: dict[str, Any] | None, expected: tuple[str, str]) -> None:
    found = report(goal=goal)
    assert (judged(found), limit_of(found)[0]) == expected


@pytest.mark.parametrize(("median", "noisy"), [(113.0, True), (115.0, False), (125.0, False), (127.0, True)])
def test_medians_of_another_ratio_are_noise(median: float, noisy: bool) -> None:
    """More than 5% above or below the ratio of 1.2."""
    ratio = {"ratio": 1.2, "low": 1.15, "high": 1.25, "verdict": "faster"}
    original, nbl = ({"tokens_per_second_median": value} for value in (100.0, median))
    assert Timed(original, nbl, ratio).verdict == "faster" + ", noisy" * noisy


def test_a_loss_that_is_not_finite_is_above() -> None:
    found = report()
    found["quality_loss"][0] |= {"increase": None, "increase_interval": None}
    assert judged(found) == "above"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(0.02, [0.01, 0.03]), (0.2, [0.15, 0.25])], "above"),  # one text is enough
        ([(0.02, [0.01, 0.03]), (0.05, [0.04, 0.06])], "undecided"),
        ([(0.02, [0.01, 0.03]), (0.04, [0.03, 0.05])], "within"),
        ([(0.2, None)], "above"),  # one window gives no interval
        ([(0.04, None)], "within"),
    ],
)
def test_every_text_is_judged(rows: list[tuple[float, list[float] | None]], expected: str) -> None:
    losses = [{"increase": value, "increase_interval": ends} for value, ends in rows]
    assert judged(report(quality_loss=losses)) == expected


@pytest.mark.parametrize(
    ("lost", "ends", "expected"),
    [(0.07, [0.05, 0.09], "within"), (0.08, [0.05, 0.11], "undecided"), (0.13, [0.11, 0.15], "above"),
     (None, None, "above")],
)  # fmt: skip
def test_long_range_tokens_of_each_text_may_lose_twice_the_limit(
    lost: float | None, ends: list[float] | None, expected: str
) -> None:
    little = {"text": "a text", "lost": 0.01, "lost_interval": [0.0, 0.02], "windows": 100}
    found = report(
        quality_loss=[{"increase": 0.0, "increase_interval": [0.0, 0.0]}],
        long_range=[little, {"text": "another", "lost": lost, "lost_interval": ends, "windows": 4}],
    )
    assert judged(found) == expected


def test_long_range_tokens_of_few_passages_are_not_judged() -> None:
    row = {"text": "a text", "lost": 0.2, "lost_interval": [0.15, 0.25], "windows": 3}
    found = report(quality_loss=[{"increase": 0.0, "increase_interval": [0.0, 0.0]}], long_range=[row])
    assert judged(found) == "within"


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([0.05, 0.09], "perplexity +0% (0 to 0), within the limit of 5%"),
        ([0.05, 0.11], "perplexity +0% (0 to 0); long-range tokens keep 92% (89 to 95) of what long-range context "
         "gives them, undecided at the limit of 5%"),
    ],
)  # fmt: skip
def test_the_verdict_names_the_figure_that_is_not_within_the_limit(ends: list[float], said: str) -> None:
    loss = {"text": "a text", "increase": 0.0, "increase_interval": [0.0, 0.0], "kl_mean": 0.0,
            "kl_interval": [0.0, 0.0], "top1_agreement": 1.0, "top1_interval": [1.0, 1.0]}  # fmt: skip
    little = {"text": "a text", "lost": 0.01, "lost_interval": [0.0, 0.02], "windows": 100}
    few = {"text": "few", "lost": 0.5, "lost_interval": [0.4, 0.6], "windows": 3}
    worst = {"text": "another", "lost": 0.08, "lost_interval": ends, "windows": 4}
    assert said in verdict(report(quality_loss=[loss], long_range=[little, worst, few]))


def test_the_text_whose_interval_reaches_furthest_loses_most() -> None:
    """Not the one that surely loses something: the limit is kept only if the upper end is within it."""
    clear = {"text": "clear", "lost": 0.08, "lost_interval": [0.07, 0.09], "windows": 50}
    wide = {"text": "wide", "lost": 0.08, "lost_interval": [0.04, 0.12], "windows": 5}
    for rows in ([clear, wide], [wide, clear]):
        assert worst_long_range(rows) == wide


def test_what_to_do_next() -> None:
    steps = dict(next_steps(report(fit="independent"), Path("my runs")))
    assert "--fit distilled" in steps["better"]
    assert steps["try"].startswith("nbl-export generate 'my runs' ")
    assert "--fit distilled" not in dict(next_steps(report(fit="distilled"), Path("r")))["better"]
    assert "better" not in dict(next_steps(report(quality_loss=[]), Path("r")))
    assert (
        dict(next_steps(report(exit={"layer": 3, "recent_tokens": 4}), Path("r")))["better"]
        == "exit higher (--exit-layer 4)"
    )


FASTER = {"engine": "another", "title": "Another", "precision": "int8", "than": "Measured", "lacks": ""}


def test_a_faster_runtime_is_named_with_its_command() -> None:
    """Only if the benchmark has noted one."""
    bench = report()["bench"]
    for found in (report(), report(bench=None, rows=[], ratios=[])):
        assert faster_runtime(found) is None
        assert "--engine another" not in markdown(document(found))
        assert "faster" not in dict(next_steps(found, Path("run")))
    said = report(bench={**bench, "faster": FASTER})
    page = markdown(document(said))
    assert "Another in int8, its default, had a faster prefill than Measured" in page
    assert "nbl-export --model tiny/decoder --engine another --output OTHER" in page
    assert "not available" not in page
    assert "--engine another" in dict(next_steps(said, Path("run")))["faster"]
    lacking = report(bench={**bench, "faster": {**FASTER, "lacks": "the package is missing"}})
    assert "not available on this machine: the package is missing" in markdown(document(lacking))
