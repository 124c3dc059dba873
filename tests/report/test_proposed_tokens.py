"""The report of `--draft`: lossless is said of float32 alone; elsewhere the share of equal answers stands there."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbl_export.measure.speculative import Asked, Sample, Way
from nbl_export.records.capabilities import Proposer
from nbl_export.report.page import render
from nbl_export.run.stages.speculative import measured, spoken

from .test_report import MANIFEST, VERIFY

PLAIN, NGRAM = Way(None, "original"), Way(Proposer("ngram", (("max_draft_tokens", 4),)), "ngram")


def figures(precision: str, differing: int) -> dict[str, Any]:
    """lossless.json of 20 prompts on five loads, of which some answers differ."""
    samples = []
    for k in range(20):
        asked = Asked("code", k, (1, 2, 3))
        for way, time in ((PLAIN, 3000), (NGRAM, 2000)):
            tokens = [5, 6, 9 if way is NGRAM and k < differing else 7]
            found = SimpleNamespace(tokens=tokens, prefill_ns=1000, decode_ns=time, proposed=4, accepted=2, rounds=2)
            samples.append(Sample(way, asked, k % 5, found))
    differences = [{"margin": 0.3}] * differing
    return {**measured("ngram", precision, samples[:2], samples), "differences": differences}


def pages(precision: str, differing: int, out: Path) -> list[str]:
    verify = {**VERIFY, "precision": precision}
    render(MANIFEST, verify, None, out, lossless=figures(precision, differing))
    return [(out / name).read_text(encoding="utf-8") for name in ("report.md", "report.html")]


@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
def test_another_precision_is_not_called_lossless(precision: str, tmp_path: Path) -> None:
    for page in pages(precision, 11, tmp_path):
        assert "Speculative decoding" in page and "Lossless decoding" not in page
        assert "In this run 9 of 20 answers (45%) equal plain decoding" in page
        assert "not lossless" in page and "keeps the original" not in page
    said = spoken(figures(precision, 11))
    assert "lossless" not in said and said.endswith("9 of 20 answers (45%) equal")


def test_float32_is(tmp_path: Path) -> None:
    for page in pages("fp32", 0, tmp_path):
        assert "Lossless decoding" in page and "not lossless" not in page
        assert "In this run 20 of 20 answers (100%) equal plain decoding" in page
    assert spoken(figures("fp32", 0)).startswith("lossless decoding with ngram")


def test_intervals_have_the_level_of_their_loads(tmp_path: Path) -> None:
    assert "Intervals of 5 loads contain the true median in 93.8% of all cases" in pages("fp32", 0, tmp_path)[0]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_the_guide_has_the_equal_answers_of_the_raw_results(precision: str) -> None:
    root = Path(__file__).parents[2]
    stored = json.loads((root / "bench" / "results" / f"lossless-smollm2-{precision}.json").read_text(encoding="utf-8"))
    equal = [row["equal"] for row in stored["overall"]]
    assert {row["prompts"] for row in stored["overall"]} == {20}
    cell = ", ".join(map(str, equal)) if precision == "fp32" else f"{min(equal)} to {max(equal)}"
    assert f"| {precision} | {cell} |" in (root / "docs" / "lossless.md").read_text(encoding="utf-8")
