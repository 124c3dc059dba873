"""The report: figures computed right, nothing claimed that was not seen, one inert page without a network."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from nbl_export.errors import CorruptError
from nbl_export.records.quality import long_range_row, retrieval_row
from nbl_export.report import plots
from nbl_export.report.console import speed_table
from nbl_export.report.document import Paragraph, html
from nbl_export.report.document import markdown as in_markdown
from nbl_export.report.document import written as blocks_in_markdown
from nbl_export.report.outcome import headline, verdict
from nbl_export.report.page import document, render, summarize
from nbl_export.report.quality import describe_curve
from nbl_export.report.speed import speed as speed_section
from nbl_export.report.table import Column, Table, facts
from nbl_export.trust.terminal import Console, visible

SECOND = 1_000_000_000

MANIFEST: dict[str, Any] = {
    "schema": 1,
    "model": {"name": "tiny/decoder", "revision": "abc123", "architecture": "LlamaForCausalLM"},
    "options": {"model": "tiny/decoder", "engine": "ort", "depths": [0, 64], "layers": None},
    "command": "nbl-export --model tiny/decoder --engine ort --layers 0,2-3 --output run",
    "versions": {"onnxruntime": "1.24.0"},
    "calibration": {"name": "a small text", "sha256": "f00d" * 16, "tokens": 65536, "context": 512},
    "num_layers": 6,
    "replaced_layers": [0, 2, 3],
    "tap": "residual",
    "select": "given",
    "scores": [{"layer": i, "bound": 10.0 + i, "nmse": 0.2, "relative_error": 0.01 * (i + 1)} for i in range(6)],
    "status": "verified",
    "stages": {"calibrate": {"key": "k", "seconds": 142.4, "files": {}}},
}
VERIFY: dict[str, Any] = {
    "passed": True,
    "precision": "fp32",
    "checks": [
        {"check": "original", "subject": "original", "metric": "max abs logit difference", "value": 2e-5,
         "tolerance": 1e-3, "passed": True, "detail": "prefill"},
        {"check": "nbl", "subject": "nbl", "metric": "max abs logit difference", "value": 7.5e-5, "tolerance": 1e-3,
         "passed": True, "detail": "16 cached steps"},
        {"check": "quality", "subject": "nbl", "metric": "mean KL", "value": 0.12, "tolerance": None, "passed": True},
    ],
    "quality_loss": [
        {"text": "held-back calibration", "tokens": 8192, "windows": 16, "perplexity_original": 20.0,
         "perplexity_nbl": 25.0, "increase": 0.25, "increase_interval": [0.181, 0.3234], "kl_mean": 0.1234,
         "kl_interval": [0.1113, 0.1371], "top1_agreement": 0.8, "top1_interval": [0.7821, 0.8179]},
    ],
    "cache_bytes_per_token": {"original": 4096, "nbl": 2048},
}  # fmt: skip


def timing(test: str, depth: int, variant: str, seconds: Sequence[float], **more: Any) -> dict[str, Any]:
    samples = [int(s * SECOND) for s in seconds]
    kind, tokens = test[:2], int(test[2:])
    facts = {"test": test, "kind": kind, "tokens": tokens, "depth": depth}
    return {**facts, "variant": variant, "samples_ns": samples, "loads": list(range(len(samples))), **more}


BENCH: dict[str, Any] = {
    "machine": {"cpu": "A processor", "cores": 2, "memory_bytes": 8 << 30, "os": "Linux", "python": "3.12"},
    "threads": 2,
    "engine": "ort",
    "provider": "cpu",
    "versions": {"onnxruntime": "1.24.0"},
    "background": {"cores": 2, "others": 0.05, "stolen": 0.0, "waits": 60, "gave_up": 0, "busy": False},
    "repetitions": 5,
    "timings": [
        # Loads 2, 3, 1.25, 2, 2: their median is 2, while the ratio of the medians is 1.67 and that of the means 2.12.
        timing("pp512", 0, "original", [1, 6, 2, 3, 2.5], first_token_ns=[10_000_000] * 5),
        timing("pp512", 0, "nbl", [0.5, 2, 1.6, 1.5, 1.25], first_token_ns=[20_000_000] * 5),
        # Loads 1.25, 0.8, 1.25, ...: above 1 in the median, not in every load.
        timing("tg128", 0, "original", [5, 4, 5, 5, 5], token_ns=[[20_000_000] * 49 + [80_000_000]] * 2),
        timing("tg128", 0, "nbl", [4, 5, 4, 4, 4], token_ns=[[10_000_000] * 49 + [50_000_000]] * 2),
        # Loads 0.5, 0.5, 0.25, ...
        timing("tg128", 64, "original", [2, 2, 2, 2, 2]),
        timing("tg128", 64, "nbl", [4, 4, 8, 4, 4]),
    ],
    "variants": {
        "original": {
            "peak_memory_bytes": 3 << 29,
            "steady_memory_bytes": 5 << 28,
            "kv_cache_bytes": 8192,
            "kv_cache_bytes_per_token": 4096,
            "model_bytes": 5 << 20,
        },
        "nbl": {
            "peak_memory_bytes": 1 << 30,
            "steady_memory_bytes": 1 << 29,
            "kv_cache_bytes": 4096,
            "kv_cache_bytes_per_token": 2048,
            "model_bytes": 4 << 20,
        },
    },
}


class Outline(HTMLParser):
    """What a browser would see: tags with their attributes, text by the tags around it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


class Written:
    """One report; with `out` the three files of it, and only then with drawings."""

    def __init__(
        self, manifest: Any = MANIFEST, verify: Any = VERIFY, bench: Any = BENCH, out: Path | None = None
    ) -> None:
        if out is None:
            self.value = summarize(manifest, verify, bench)
            content = document(self.value)
            self.html, self.markdown, self.json = html(content, {}), in_markdown(content), self.value
            return
        self.value = render(manifest, verify, bench, out)
        self.html = (out / "report.html").read_text(encoding="utf-8")
        self.markdown = (out / "report.md").read_text(encoding="utf-8")
        self.json = json.loads((out / "report.json").read_text(encoding="utf-8"))

    def table(self, title: str) -> list[list[str]]:
        """Cells of the Markdown table under a heading."""
        after = re.split(rf"^#+ {re.escape(title)}$", self.markdown, flags=re.MULTILINE)[1]
        lines = re.split(r"^#", after, flags=re.MULTILINE)[0].splitlines()
        return [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(out=tmp_path_factory.mktemp("report"))


def changed(value: Any, **facts: Any) -> Any:
    return {**copy.deepcopy(value), **facts}


def card(page: str, title: str) -> str:
    """The mark-up of one figure of the headline."""
    return next(part for part in re.findall(r'<li class="card.*?</li>', page, re.DOTALL) if f"<span>{title}" in part)


# -- values --------------------------------------------------------------------------------------------------


def test_rows_are_tokens_per_second(written: Written) -> None:
    rows = {(r["test"], r["depth"], r["variant"]): r for r in written.json["rows"]}
    assert len(rows) == 6
    row = rows["pp512", 0, "original"]
    assert row["samples"] == pytest.approx([512, 512 / 6, 256, 512 / 3, 204.8])
    assert row["tokens_per_second_median"] == pytest.approx(204.8)
    assert row["tokens_per_second_stdev"] == pytest.approx(161.278, abs=1e-3)


def test_rounds_that_are_no_pairs_are_refused() -> None:
    original = timing("pp8", 32, "original", [2, 2])
    for nbl, said in (
        (timing("pp8", 32, "nbl", [1, 1, 1]), r"2 rounds.*3 of NBL for pp8 at depth 32.*bench stage"),
        (timing("pp8", 32, "nbl", [1, 1], loads=[0, 0]), "same loads"),
    ):
        with pytest.raises(CorruptError, match=said):
            summarize(MANIFEST, VERIFY, changed(BENCH, timings=[original, nbl]))


def test_latency_is_shown_where_it_was_measured(written: Written) -> None:
    assert [row[3:5] for row in written.table("Speed")[2:]] == [
        ["2,510 ms", "1,520 ms"],
        ["20.0 ms", "10.0 ms"],
        ["–"] * 2,
    ]
    row = next(r for r in written.json["rows"] if (r["test"], r["depth"], r["variant"]) == ("tg128", 0, "nbl"))
    assert row["tpot_seconds"] == {"p50": 0.01, "p95": 0.01, "p99": 0.05} and row["ttft_seconds"] is None
    bare = [{k: v for k, v in t.items() if not k.endswith("token_ns")} for t in BENCH["timings"]]
    unknown = Written(bench=changed(BENCH, timings=bare))
    assert {cell for row in unknown.table("Speed")[2:] for cell in row[3:5]} == {"–"}
    assert "<strong>2.00× faster, noisy</strong>" in card(unknown.html, "Time to first token")


CURVE: dict[str, Any] = {
    "texts": ["held back", "documentation"],
    "engine": "ort", "precision": "fp16", "tokens": 512,
    "points": [
        {"layers": n, "replaced_layers": list(range(6 - n, 6)), "kl": [0.01 * n, 0.02 * n],
         "increases": [0.02 * n, 0.04 * n], "prefill": 1 + 0.03 * n, "decode": 1 + 0.01 * n}
        for n in (1, 3, 4, 5)
    ],
}  # fmt: skip


def test_the_curve_is_drawn_with_a_ring_at_this_runs_number(tmp_path: Path) -> None:
    render({**MANIFEST, "curve": CURVE, "select": "efficient"}, VERIFY, None, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'id="curve-' in page and "3 layers</text>" in page


ANSWERS = [{"prompt": "The sky", "original": " is blue.\n\nIt is", "nbl": " is blue"},
           {"prompt": "One", "original": " two", "nbl": " two"}]  # fmt: skip


def test_text_of_both_stands_side_by_side() -> None:
    shown = Written(verify=changed(VERIFY, answers=ANSWERS))
    assert "1 of 2 texts is the same" in shown.markdown
    section = shown.html.split("<h2>What both write</h2>")[1].split("</section>")[0]
    pairs = re.findall(r'<div class="pair">\s*<div>(.*?)</div>\s*<div>(.*?)</div>', section, re.DOTALL)
    said = [[re.findall(r">([^<]+)</(?:h3|p)>", side) for side in pair] for pair in pairs]
    assert said[0] == [["Original", "is blue.\n\nIt is"], ["NBL", "is blue"]] and len(said) == 2
    warns = "words of the calibration text: pass it on only if others may read them"
    assert all(warns in text for text in (shown.markdown, shown.html))
    assert "What both write" not in Written().markdown and warns not in Written().markdown
    asked = Written(verify=changed(VERIFY, answers=ANSWERS, passage="A text."))
    assert "<h3>The sky</h3>" in asked.html and "A text." in asked.markdown and warns not in asked.markdown
    assert 'nbl-export generate run "..." --both' in "".join(Outline(asked.html).text)


def test_a_check_without_a_figure_has_a_mark() -> None:
    def check(name: str, value: float) -> dict[str, Any]:
        return {"check": name, "subject": "nbl", "metric": "m", "value": value, "tolerance": 0.5, "passed": not value}

    shown = Written(
        verify=changed(VERIFY, checks=[check("structure", 0.0), check("structure", 1.0), check("text", 0.0)])
    )
    assert [row[3:5] for row in shown.table("All 3 checks")[2:]] == [["✓", ""], ["✗", ""], ["0", "0.5"]]


def test_a_busy_machine_is_said_wherever_speed_is(written: Written, capsys: Any) -> None:
    """In the headline, in the section that a model card has too, and on a terminal. Nothing is called idle."""
    shared = {**BENCH["background"], "others": 0.83, "busy": True}
    busy = Written(bench=changed(BENCH, background=shared))
    said = "on a busy machine: other processes used 0.83 of 2 cores"
    for text in (busy.html, busy.markdown):
        headline, speed = re.split(r"<h2>Speed|\n## Speed", text)[:2]
        assert said in headline and said in speed
    assert said in blocks_in_markdown(speed_section(busy.value).blocks)
    Console(width=200).print(*speed_table(busy.value), sep="\n")
    assert said in capsys.readouterr().out
    assert "busy" not in written.html and "other processes used 0.05 of 2 cores" in written.markdown
    assert "idle" not in busy.markdown and "idle" not in written.markdown


def test_a_variant_alone_has_rows_and_no_ratio() -> None:
    written = Written(bench=changed(BENCH, timings=[timing("pp8", 0, "nbl", [1, 1, 1])]))
    assert len(written.json["rows"]) == 1 and written.json["ratios"] == []
    assert "not measured" in card(written.html, "Decode")


# -- honesty -------------------------------------------------------------------------------------------------


def test_a_range_with_one_inside_is_never_called_a_win(written: Written) -> None:
    further = card(written.html, "Decode")
    assert "<strong>no clear difference</strong>" in further
    assert '"card ok"' not in further and "1.25×" not in written.html and "1.25×" not in written.markdown
    ratios = {row[0]: row[5:] for row in written.table("Speed")[2:]}
    assert ratios == {
        "prompt of 512 tokens": ["2.00 (1.25 to 3.00)", "faster, noisy"],
        "128 new tokens": ["1.25 (0.80 to 1.25)", "no clear difference"],
        "128 new tokens behind 64": ["0.50 (0.25 to 0.50)", "slower, noisy"],
    }


def clear(**tests: float) -> dict[str, Any]:
    """bench.json of tests with these ratios and narrow intervals."""
    timings = []
    for test, ratio in tests.items():
        first = {"first_token_ns": [0] * 5} if test.startswith("pp") else {}
        timings += [timing(test, 0, "original", [ratio] * 5, **first), timing(test, 0, "nbl", [1.0] * 5, **first)]
    return changed(BENCH, timings=timings)


def test_the_headline_is_the_longest_prompt() -> None:
    shown = card(Written(bench=clear(pp512=1.1, pp2048=1.5, tg8=1.0)).html, "Time to first token")
    assert '"card ok"' in shown and "<strong>1.50× faster</strong>" in shown
    bars = re.findall(r'<i class="(\w+)" style="width: ([\d.]+)%"></i><b>(.*?)</b>', shown)
    assert bars == [("original", "60.0", "1,500 ms original"), ("nbl", "40.0", "1,000 ms NBL")]
    lines = re.findall("<small>(.*?)</small>", shown)
    assert lines[0] == "prompt of 2,048 tokens: 1,500 ms → 1,000 ms, 1.50× (1.50 to 1.50)" and "512" in lines[1]


@pytest.mark.parametrize(
    ("tests", "noise", "increase", "expected"),
    [
        (
            {"pp512": 1.1, "pp2048": 1.5, "tg8": 1.0},
            1,
            0.01,
            "Worth it for prompts of 512 and 2,048 tokens (all lengths measured).",
        ),
        (
            {"pp512": 0.9, "pp1024": 1.0, "pp2048": 1.5, "tg8": 1.0},
            1,
            0.01,
            "Worth it for prompts of 2,048 tokens (not shown at 1,024, slower at 512).",
        ),
        (
            {"pp512": 1.5, "pp2048": 0.9, "tg8": 1.5},
            1,
            0.01,
            "Worth it for prompts of 512 tokens (slower at 2,048); decode is faster too.",
        ),
        (
            {"pp8": 1.5, "tg8": 0.5},
            1,
            0.01,
            "Worth it for prompts of 8 tokens (the only length measured); decode is slower.",
        ),
        ({"pp8": 1.0, "tg8": 1.5}, 1, 0.01, "Worth it for long answers, not for prompts."),
        ({"pp8": 1.2}, 3, 0.01, "Not shown to be worth it: the measurement is noisy."),
        ({"pp8": 1.5}, 1, 0.5, "Faster, but not worth it at this limit."),
        ({"pp8": 1.5}, 1, 0.05, "Worth it for prompts of 8 tokens (the only length measured)."),
        ({"pp8": 1.0}, 1, 0.01, "Worth it for a smaller cache alone: no test is clearly faster."),
        ({}, 1, 0.01, "Speed was not measured."),
    ],
)
def test_the_verdict_is_of_what_was_measured(
    tests: dict[str, float], noise: float, increase: float, expected: str
) -> None:
    bench = clear(**tests)
    for row in bench["timings"]:
        if row["variant"] == "original":
            row["samples_ns"][0] = int(row["samples_ns"][0] * noise)
    verify = copy.deepcopy(VERIFY)
    verify["quality_loss"][0] |= {"increase": increase, "increase_interval": [increase - 0.02, increase + 0.02]}
    said = verdict(summarize(MANIFEST, verify, bench if tests else None))
    limit = {0.01: "within", 0.05: "undecided at", 0.5: "above"}[increase]
    assert said.startswith(f"{expected} Loses: perplexity +") and f"{limit} the limit of 5%" in said


@pytest.mark.parametrize(("begun", "said"), [(1.0, "Not worth it here"), (1.5, "Worth it for prompts of 512 tokens")])
def test_what_follows_a_conversation_is_no_prompt_of_the_verdict(begun: float, said: str) -> None:
    """It is a line of its own: an exit layer gains on it what it does not gain at the beginning, or the reverse."""
    bench = clear(pp512=begun, tg8=1.0)
    behind = clear(pp1024=2.5 - begun)["timings"]
    bench["timings"] += [row | {"depth": 64} for row in behind]
    found = summarize(MANIFEST, VERIFY, bench)
    found["cache_bytes_per_token"] = {"original": 1024, "nbl": 1024}
    found["quality_loss"] = []
    assert verdict(found).startswith(said) and "1,024" not in verdict(found)
    assert [test.row["depth"] for test in headline(found, "pp")] == [0, 64]


def test_few_loads_give_no_verdict_on_speed() -> None:
    bench = clear(pp8=2.0)
    for row in bench["timings"]:
        row |= {name: row[name][:1] for name in ("samples_ns", "loads", "first_token_ns")}
    assert verdict(summarize(MANIFEST, VERIFY, bench)).startswith("Too few loads for a verdict on speed. Loses: ")


def test_no_verdict_of_a_failed_run_or_of_the_original() -> None:
    assert verdict(summarize(MANIFEST, changed(VERIFY, passed=False), BENCH)) == ""
    assert verdict(summarize(changed(MANIFEST, replaced_layers=[]), VERIFY, BENCH)) == ""


def test_every_page_gives_the_level_of_the_loads() -> None:
    """Of rounds that ended by their width; other levels: `tests/records/test_paired.py`."""
    bench = changed(BENCH, repetitions=None)
    for one in bench["timings"]:
        one |= {"samples_ns": (2 * one["samples_ns"])[:6], "loads": list(range(6))}
    shown, said = Written(bench=bench), "94.4% interval of 6 loads, ended by its width"
    assert {(ratio["interval"], ratio["confidence"]) for ratio in shown.json["ratios"]} == {(said, 0.944)}
    assert f"Intervals: {said}." in shown.markdown and said in shown.html


def test_skipped_tests_are_named() -> None:
    skipped = [{"test": "tg128", "depth": 2048, "reason": "2048 + 128 tokens are more than the context, 2048"}]
    written = Written(bench=changed(BENCH, skipped=skipped))
    assert (
        "Not measured: 128 new tokens behind 2,048. 2048 + 128 tokens are more than the context, 2048."
        in written.markdown
    )


def test_headline(written: Written) -> None:
    assert "3 of 6 attention layers are replaced by a linear layer: layers 0, 2-3" in written.markdown
    assert "−50.0%" in card(written.html, "KV cache") and "4.00 KiB → 2.00 KiB" in card(written.html, "KV cache")
    quality_loss = card(written.html, "Quality loss")
    assert '"card bad"' in quality_loss and "<strong>+25%</strong>" in quality_loss
    assert "above the limit of 5% (the default)" in quality_loss
    assert "+25% (18 to 32) on held-back calibration: 20.0 → 25.0" in quality_loss
    assert "largest logit difference 7.50e-05 (nbl, max abs logit difference), tolerance 0.001" in written.markdown
    assert written.html.count('class="gone linear"') == 3 and written.html.count('class="key linear"') == 1
    predicted = {"kinds": ["linear", "predicted_kv", "predicted_kv"]}
    assert re.findall('class="gone (.*?)"', Written({**MANIFEST, **predicted}).html) == predicted["kinds"]
    goal = {"max_perplexity_increase": "40%", "default": False}
    assert '"card ok"' in card(Written({**MANIFEST, "goal": goal}).html, "Quality loss")


def test_what_does_not_differ_has_a_line_and_no_card() -> None:
    bench = clear(pp512=1.5, tg8=1.0)
    same = Written(verify=changed(VERIFY, cache_bytes_per_token={"original": 4096, "nbl": 4096}), bench=bench)
    assert "Decode of 8 new tokens: no clear difference (1.000 to 1.000)." in same.html
    assert "KV cache: as in the original, 4.00 KiB for each token." in same.html
    assert len(re.findall('<li class="card', same.html)) == 2
    slower = Written(bench=clear(pp512=1.5, tg8=0.5)).html
    assert '"card bad"' in card(slower, "Decode") and "<strong>0.50×</strong>" in card(slower, "Decode")
    assert "−50.0%" in card(slower, "KV cache") and "as in the original" not in slower


def test_numbers_that_are_right_are_no_promise_of_quality(written: Written) -> None:
    """The badge stands below loss and speed, and says what it does not mean. A failed run says so first."""
    cards = written.html.index('<ul class="cards">')
    badge = written.html.index('<p class="badge ok"><strong>Numerics verified')
    assert cards < badge and "which says nothing about quality" in written.html[badge : written.html.index("<nav")]
    broken = Written(changed(MANIFEST, status="failed"), failed(0.5)).html
    assert broken.index('<p class="badge bad">') < broken.index('<ul class="cards">')


def test_headline_price_is_that_of_the_worst_text() -> None:
    """Whichever text comes first: a gain seen on one text misleads."""
    cheap = {**VERIFY["quality_loss"][0], "text": "cheap", "perplexity_nbl": 21.0, "increase": 0.05}
    dear = {**cheap, "text": "dear", "perplexity_original": 10.0, "perplexity_nbl": 30.0, "increase": 2.0}
    for order in ([cheap, dear], [dear, cheap]):
        shown = card(Written(MANIFEST, changed(VERIFY, quality_loss=order)).html, "Quality loss")
        assert "+200% (18 to 32) on dear: 10.0 → 30.0" in shown and "20.0" not in shown
        assert "cheap" not in shown  # the table has it


def test_a_price_that_is_not_finite_is_the_worst_and_has_no_interval() -> None:
    broken = dict.fromkeys(("perplexity_nbl", "increase", "increase_interval", "kl_mean", "kl_interval"))
    rows = [VERIFY["quality_loss"][0], {**VERIFY["quality_loss"][0], "text": "broken", **broken}]
    for order in (rows, rows[::-1]):
        written = Written(MANIFEST, changed(VERIFY, quality_loss=order))
        assert "20.0 → not finite" in card(written.html, "Quality loss")
        assert "not finite on broken" in written.markdown


def failed(value: float) -> dict[str, Any]:
    verify = copy.deepcopy(VERIFY)
    verify["checks"][1] |= {"value": value, "passed": False, "detail": "layer 3 is off"}
    return changed(verify, passed=False)


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.500"), (float("nan"), "not finite"), (float("inf"), "not finite")]
)
def test_failed_verification_is_shown(value: float, text: str) -> None:
    written = Written(changed(MANIFEST, status="failed"), failed(value))
    sentence = f"Check nbl, nbl, max abs logit difference: {text}, tolerance 0.001. layer 3 is off"
    for page in (written.html, written.markdown):
        assert "Verification failed" in page and sentence in page and "Do not deploy" in page
        assert f"largest logit difference {text} (nbl, " in page
    assert '<p class="badge bad">' in written.html and ">Numerics verified<" not in written.html
    assert written.json["status"] == "failed"


@pytest.mark.parametrize("where", ["status", "passed", "check"])
def test_one_sign_of_failure_is_enough(where: str) -> None:
    manifest = changed(MANIFEST, status="failed") if where == "status" else MANIFEST
    verify = changed(VERIFY, passed=where != "passed")
    verify["checks"][0]["passed"] = where != "check"
    assert summarize(manifest, verify, None)["status"] == "failed"
    assert summarize(MANIFEST, VERIFY, None)["status"] == "verified"


def test_without_bench_speed_is_not_measured() -> None:
    written = Written(bench=None)
    assert "Speed and memory were not measured." in written.html
    assert "Speed and memory were not measured." in written.markdown
    assert all("not measured" in card(written.html, name) for name in ("Time to first token", "Decode"))
    assert written.json["rows"] == written.json["ratios"] == [] and written.json["machine"] is None
    assert "tokens per second" not in written.html.lower()


def test_without_price_and_without_replaced_layers() -> None:
    written = Written(changed(MANIFEST, replaced_layers=[]), changed(VERIFY, quality_loss=[]))
    assert "None of the 6 attention layers is replaced" in written.markdown
    assert "The quality loss was not measured." in written.markdown and 'class="gone' not in written.html


# -- the page ------------------------------------------------------------------------------------------------


def test_the_page_is_self_contained(written: Written) -> None:
    tags = Outline(written.html).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "img", "object", "embed", "base", "image"}
    for tag, attributes in tags:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "action", "data") and not name.startswith("on"), (tag, name)
            assert "href" not in name or (value or "").startswith("#"), (tag, value)
    assert "http:" not in written.html and "https:" not in written.html and "@import" not in written.html
    assert not re.search(r"url\((?!#)", written.html)


def test_ids_are_unique_and_references_resolve(written: Written) -> None:
    ids = re.findall(r'\bid="([^"]*)"', written.html)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', written.html)) <= set(ids)


HOSTILE = "</pre></title><script>alert(1)</script>|<img src=x onerror=y>\n# `code` [a](b) 'single' \"double\""
HOSTILE += " \u202eno\u2066p\u200e\x1b[31m"


def test_what_others_wrote_is_inert() -> None:
    manifest = changed(MANIFEST, command=f"nbl-export --model {HOSTILE}", versions={HOSTILE: HOSTILE})
    manifest["model"] = dict.fromkeys(("name", "revision", "architecture"), HOSTILE)
    manifest["options"]["model"] = manifest["calibration"]["name"] = manifest["calibration"]["sha256"] = HOSTILE
    verify, bench = copy.deepcopy(VERIFY), copy.deepcopy(BENCH)
    verify["quality_loss"][0]["text"] = HOSTILE
    verify["checks"][0] |= {"detail": HOSTILE, "metric": f"logit {HOSTILE}", "passed": False}
    bench["machine"]["cpu"] = bench["machine"]["os"] = bench["provider"] = HOSTILE
    written = Written(manifest, verify, bench)
    outline = Outline(written.html)
    assert not {tag for tag, _ in outline.tags} & {"script", "img"}
    assert all((attributes["href"] or "").startswith("#") for tag, attributes in outline.tags if tag == "a")
    assert not any(name.startswith("on") for _, attributes in outline.tags for name in attributes)
    assert "<script>alert(1)</script>" in "".join(outline.text)
    prose = [line for line in written.markdown.splitlines() if not line.startswith("    ")]
    assert not [line for line in prose if re.search(r"(?<!\\)[<`\[]", line)]
    assert "\\<script\\>" in written.markdown and not any(line.startswith("# `") for line in prose)
    for text in (written.markdown, written.html):
        assert visible(text) == text and r"\u202e" in text
    widths = {title: {len(row) for row in written.table(title)} for title in ("Quality loss", "Versions", "Settings")}
    assert all(len(width) == 1 for width in widths.values()), widths


@pytest.mark.parametrize("begin", ["# a", "- a", "+ a", "1. a", "12) a", "===", "~~~"])
def test_a_text_of_others_begins_no_block(begin: str) -> None:
    (line,) = blocks_in_markdown([Paragraph(begin)]).splitlines()
    assert line.replace("\\", "") == begin and re.match(r"\d*\\", line)


def test_every_writer_has_the_cells_of_a_table(capsys: Any) -> None:
    table = Table.of(("name", Column("size", "number")), [("a|b, c", 7), (None, 12.5)], "Sizes", totals=1)
    assert table.markdown().splitlines() == ["| name | size |", "| --- | ---: |", r"| a\|b, c | 7 |", "|  | 12.5 |"]
    Console(width=40).print(table)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "Sizes" and lines[4:7] == ["│ a|b, c │    7 │", "├────────┼──────┤", "│        │ 12.5 │"]
    Console(width=40).print(facts([("model", "m"), ("layers", 3)]))
    assert capsys.readouterr().out.splitlines() == [" model   m ", " layers  3 "]


def test_no_path_of_the_maker_is_told() -> None:
    """Of a report that is passed on; nbl.json keeps them."""
    home = "/home/ann/my models"
    options = {**MANIFEST["options"], "model": f"{home}/a.gguf", "calibration": [f"{home}/b.txt:2"]}
    command = f"nbl-export --model '{home}/a.gguf' --calibration '{home}/b.txt:2' --output /home/ann/run"
    model = {**MANIFEST["model"], "name": f"{home}/a.gguf"}
    written = Written(changed(MANIFEST, options=options, command=command, model=model))
    assert "/home" not in json.dumps(written.json) + written.html + written.markdown
    assert written.json["command"] == "nbl-export --model a.gguf --calibration b.txt:2 --output run"


def test_the_command_is_exact() -> None:
    command = "nbl-export --model 'my model' --calibration a--b_c*d.txt  --output run"
    written = Written(changed(MANIFEST, command=command), bench=None)
    assert f"\n    {command}\n" in written.markdown
    codes = re.findall(r"<pre>(.*?)</pre>", written.html, re.DOTALL)
    assert "".join(Outline(codes[0]).text) == command


def test_same_input_same_bytes(written: Written, tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 25, "axes.linewidth": 9, "svg.hashsalt": None}):
        again = Written(copy.deepcopy(MANIFEST), copy.deepcopy(VERIFY), copy.deepcopy(BENCH), tmp_path)
    assert (again.html, again.markdown, again.json) == (written.html, written.markdown, written.json)
    assert "<dc:date>" not in written.html and "Matplotlib" not in written.html


def test_markdown_has_the_tables_of_the_page(written: Written) -> None:
    rules = [line for line in written.markdown.splitlines() if line.startswith("| ---")]
    assert len(rules) == written.html.count("<table>") > 8
    assert written.table("Speed")[2][:3] == ["prompt of 512 tokens", "205", "341"]
    assert written.table("Memory and size")[2] == ["Peak memory of the process", "1.50 GiB", "1.00 GiB", "−33.3%"]
    assert written.table("Quality loss")[2] == [
        "held-back calibration", "8,192 (16)", "20.0", "25.0", "+25% (18 to 32)", "0.123 (0.111 to 0.137)",
        "80.0% (78.2 to 81.8)",
    ]  # fmt: skip
    assert [row[5] for row in written.table("All 3 checks")[2:]] == ["passed", "passed", "not gated"]
    assert [row[0] for row in written.table("Settings")[2:]] == ["model", "engine", "depths"]  # what is unset is not
    for fit, named in (("independent", False), ("distilled", True)):
        trained = changed(MANIFEST, options={**MANIFEST["options"], "lora_rank": 16}, fit={"kind": fit})
        assert ("lora rank" in [row[0] for row in Written(trained).table("Settings")]) is named
    assert "Text by use" not in written.markdown
    texts = [{"use": "calibration: scores and maps", "text": "a text", "tokens": 65536}]
    told = Written(MANIFEST, changed(VERIFY, texts=texts))
    assert told.table("Text by use")[2] == ["calibration: scores and maps", "a text", "65,536"]
    assert written.table("Stages")[2] == ["calibrate", "2 min 22 s"]
    assert written.table("Scores of all layers")[4] == ["2", "replaced", "12.0", "0.200", "0.0300"]
    assert ["sha256", "f00d" * 16] in written.table("Calibration text")
    assert ["memory", "8.00 GiB"] in written.table("Machine")
    assert "<svg" not in written.markdown and "depth 0" not in written.markdown


def test_the_gpu_of_the_benchmark_is_named() -> None:
    card = {
        "name": "NVIDIA L4", "compute": "8.9", "cuda": "13.0", "driver": "580.65.06", "memory_bytes": 24 << 30,
        "memory_bytes_per_second": 300_048_000_000,
    }  # fmt: skip
    bench = copy.deepcopy(BENCH)
    bench["machine"]["gpu"] = card
    bench["gpu_clocks"] = {"runs": 24, "sm_mhz": [1410, 2040], "slowed_by": {"power limit": 3}}
    for variant, size in (("original", 4 << 30), ("nbl", 3 << 30)):
        bench["variants"][variant]["device_memory_bytes"] = size
    written = Written(bench=bench)
    machine = written.table("Machine")
    assert ["GPU", "NVIDIA L4 (compute capability 8.9), driver 580.65.06, CUDA 13.0"] in machine
    assert ["memory of the GPU", "24.0 GiB, 300 GB/s by clock and bus"] in machine
    assert ["clock of the GPU", "1,410 to 2,040 MHz behind the runs"] in machine
    assert ["slowed by power limit", "3 of 24 runs"] in machine
    sizes = written.table("Memory and size")
    assert sizes[2] == ["Memory of the GPU", "4.00 GiB", "3.00 GiB", "−25.0%"]


@pytest.mark.parametrize(("tokens", "said"), [((1, 1, 2), True), ((1, 1, 1), False)])
def test_engines_say_what_decode_copies_and_not_which_kernels_run(tokens: tuple[int, ...], said: bool) -> None:
    engine = {
        "engine": "trt-rtx", "version": "1.7.1", "precision": "bf16", "compute_capabilities": ["8.9"], "max_batch": 1,
        "max_seq_len": 32_768, "prefill_chunk": 512, "attention": "fused", "build_seconds": 1.0, "plan_bytes": 1 << 20,
        "cache_bytes_per_token": 8, "cache_bytes": 1 << 18, "cache_layers": 2,
        "profiles": [{"name": "prefill", "tokens": (1, 512, 512)}, {"name": "decode", "tokens": tokens}],
    }  # fmt: skip
    page = Written(changed(MANIFEST, engines={"original": engine, "nbl": engine})).markdown
    assert "had to fuse attention; which kernels it took is not known" in page
    assert ("copies keys and values of all slots for each query head" in page) is said


def test_throughput_plot_writes_the_paired_ratio(written: Written) -> None:
    drawing = plots.throughput(written.json["rows"], written.json["ratios"])
    texts = [text.strip() for text in Outline(drawing).text if text.strip()]
    assert {"2.00×", "0.50×", "no clear", "difference", "Prefill", "Decode", "205"} <= set(texts)
    bars = re.findall(r'<path [^>]*clip-path[^>]*style="fill: var\(--(nbl|original)', drawing)
    assert bars == ["original", "nbl"] * 3


def test_what_is_drawn_is_what_was_measured(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whiskers reach the lowest and the highest round; a curve takes the worst text."""
    monkeypatch.setattr(plots, "_svg", lambda figure, *_: figure)

    def whiskers(drawn: Any, across: int) -> list[list[float]]:
        found = [c for axis in drawn.axes for c in axis.containers if hasattr(c, "has_yerr")]
        return [s[:, across].tolist() for c in found for lines in c.lines[2] for s in lines.get_segments()]

    rows = written.json["rows"]
    ends = [[min(row["samples"]), max(row["samples"])] for row in rows]
    assert whiskers(plots.throughput(rows, []), 0) == pytest.approx(np.array(ends))
    points = [{**point, "increases": [0.1, 0.02, 0.05]} for point in CURVE["points"]]
    assert plots.curve(points, 3).axes[0].lines[0].get_ydata() == pytest.approx([1.1] * 4)  # type: ignore[attr-defined]
    assert describe_curve({"points": points}).count("+10.0%") == 4
    both = [{**point, "recent_tokens": recent_tokens} for point in points for recent_tokens in (64, 128)]
    of_exits, *rings = plots.curve(both, 3, 128).axes[0].lines  # type: ignore[attr-defined]
    assert of_exits.get_linestyle() == "None"  # two exit layers are not more and less of one thing
    assert [ring.get_xdata().tolist() for ring in rings] == [[both[3]["prefill"]]]


def test_points_of_exit_layers_have_their_recent_tokens() -> None:
    points = [{**point, "recent_tokens": 4, "long_range": 0.05} for point in CURVE["points"]]
    goal = {"max_perplexity_increase": "40%", "default": False, "path": []}
    exit_layer = {
        "exit": {"layer": 3, "recent_tokens": 4},
        "replaced_layers": [3, 4, 5],
        "goal": goal,
        "curve": {**CURVE, "points": points},
    }
    said = Written(changed(MANIFEST, **exit_layer)).markdown
    assert "| Exit layer | Recent tokens |" in said and said.count("| −5.00% |") == len(points)


def test_retrieval_items_have_a_row_a_kind_of_the_candidate_that_was_chosen() -> None:
    found = [
        retrieval_row("retrieval: pairs", [(10, 5.0, 5.3, 10.0), (10, 5.0, 5.5, 10.0)] * 2),
        retrieval_row("retrieval: sentences", [(10, 20.0, 25.0, 10.0)] * 4),
        retrieval_row("retrieval: variables", []),
    ]
    other = {"layers": 9, "within": False, "retrieval": [retrieval_row("refused", [(10, 5.0, 9.0, 10.0)] * 4)]}
    path = [{"layers": 1, "within": True, "retrieval": found}, other, {"layers": 0, "within": True}]
    written = Written(manifest={**MANIFEST, "goal": {"path": path}})
    said = written.markdown
    assert "| retrieval: pairs | 40 (4) | 1.65 | 1.72 | 96" in said and "refused" not in said
    assert "| retrieval: sentences | 40 (4) | 7.39 | 12.2 | 50% (50 to 50) | no |" in said
    assert "| retrieval: variables | 0 (0) |" in said
    assert "answers of retrieval items keep 96" in written.html
    promised = "So do the answers of retrieval items that the original finds."
    assert promised in said and promised not in Written(manifest={**MANIFEST, "goal": {"path": [other]}}).markdown


def test_long_range_tokens_have_a_row_a_text() -> None:
    passages = [(10, 20.0, 21.0, 10.0), (10, 20.0, 22.0, 10.0)] * 2
    rows = [long_range_row("own text", passages), long_range_row("second text", passages[:3])]
    said = Written(verify={**VERIFY, "long_range_by_text": rows}).markdown
    assert "| own text | 40 (4) |" in said and "| second text | 30 (3) |" in said
    worst = long_range_row("worst", [(10, 20.0, 24.0, 10.0), (10, 20.0, 25.0, 10.0)] * 2)
    judged = Written(verify={**VERIFY, "long_range_by_text": [rows[0], worst, rows[1]]})
    lines = re.findall("<small>(.*?)</small>", card(judged.html, "Quality loss"))
    assert lines[-1] == "long-range tokens keep 55% (36 to 74) at worst", lines


def test_report_says_at_which_look_the_reading_ended(tmp_path: Path) -> None:
    (row,) = VERIFY["quality_loss"]
    for looks, said in (([16, 32, 64], "read further: look 1 of 3, on held-back calibration."), (None, "")):
        one = row if looks is None else {**row, "looks": looks}
        render(MANIFEST, {**VERIFY, "quality_loss": [one]}, BENCH, tmp_path)
        page = (tmp_path / "report.md").read_text()
        assert said in page and ("look 1 of" in page) is bool(said)
