"""Quality at length in the report: tables and warning; of both decoders, or of one alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbl_export.report import length
from nbl_export.report.console import eval_table
from nbl_export.report.document import written
from nbl_export.report.page import render
from nbl_export.report.quality import quality

from .test_report import BENCH, MANIFEST, VERIFY

RISES = {128: 0.1, 1024: 0.2, 4096: 0.3}


def row(tokens: int, rise: float, correct: tuple[float, float]) -> dict[str, Any]:
    interval, losses = [rise - 0.05, rise + 0.05], (2.0, 2.0 + rise)
    figures = [{"loss": loss, "correct": share} for loss, share in zip(losses, correct, strict=True)]
    return {
        "tokens": tokens,
        "figures": dict(zip(("original", "nbl"), figures, strict=True)),
        "differences": [
            {"loss": rise, "loss_interval": interval, "increase": rise * 1.1,
             "increase_interval": [end * 1.1 for end in interval]}
        ],
    }  # fmt: skip


def found() -> list[dict[str, Any]]:
    positions = [row(tokens, rise, (0.5, 0.4)) for tokens, rise in RISES.items()]
    keys = [row(512, 0.5, (1.0, 0.75)), row(4096, 2.0, (0.875, 0.125))]
    about = {"limit": 8, "items": 8, "warnings": []}
    return [
        {"task": "position:wiki", "test": "position", **about, "rows": positions, "warnings": ["it grows"]},
        {"task": "retrieval:wiki", "test": "retrieval", **about, "rows": keys},
        {"task": "copying", "test": "copying", **about, "rows": keys},
    ]


def measured(values: list[dict[str, Any]]) -> dict[str, Any]:
    return {"lm_eval": "1", "table": [], "length": values}


def test_the_report_has_tables_and_a_warning(tmp_path: Path) -> None:
    report = render(MANIFEST, VERIFY, BENCH, tmp_path, quality=measured(found()))
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "Note: it grows." in page
    assert "### Loss by position" in text and "### Retrieval and copying" in text
    assert "| wiki | 1024–4095 | 8 | 7.39 | 9.97 | +33% (28 to 38) |" in text
    assert "| retrieval:wiki | 4,096 | 8 | 88% | 12% | 2.00 | 4.00 | +2.00 (1.95 to 2.05) |" in text
    assert "Note: it grows." in written(quality(report).blocks)  # what the model card shows
    loss = page.split("Quality loss: perplexity")[1].split("</li>")[0]
    assert "+33% (28 to 38) on wiki, positions 1024–4095" in loss
    assert "finds 12% of the keys in 4,096 tokens, the original 88%" in loss


def test_one_decoder_alone_has_figures_without_differences() -> None:
    alone = found()
    for one in alone:
        for line in one["rows"]:
            line["figures"].pop("original", None)
            line["differences"] = []
    text = "\n".join(table.markdown() for table in length.tables(alone))
    assert "| wiki | 1024–4095 | 8 | – | 9.97 | – |" in text


def test_a_task_with_examples_has_a_row_of_its_own(tmp_path: Path) -> None:
    def of(shots: int | None) -> dict[str, Any]:
        figures = {"original": {"value": 0.5, "stderr": 0.1}, "nbl": {"value": 0.4, "stderr": 0.1}}
        about = {"task": "arc_easy", "num_fewshot": shots, "metric": "acc", "items": 9, "higher_is_better": True}
        return {**about, "figures": figures, "differences": []}

    found = {"lm_eval": "1", "table": [of(None), of(0), of(1), of(5)], "length": []}
    names = ["arc_easy", "arc_easy", "arc_easy, 1 example", "arc_easy, 5 examples"]
    (table,) = eval_table(found)
    assert [row[0].text for row in table.rows] == names  # type: ignore[union-attr]
    render(MANIFEST, VERIFY, BENCH, tmp_path, quality=found)
    shown = [
        line
        for line in (tmp_path / "report.md").read_text().replace("\\_", "_").splitlines()
        if line.startswith("| arc_easy")
    ]
    assert [line.split(" | ")[0].removeprefix("| ") for line in shown] == names
