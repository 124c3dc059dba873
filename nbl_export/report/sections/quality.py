"""Quality loss on held-out text, the uses of text, and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nbl_export.records.results import COMPARED, VERIFIED
from nbl_export.report import words
from nbl_export.report.blocks import (
    Block,
    Column,
    Heading,
    Paragraph,
    Section,
    Table,
)
from nbl_export.text.window_intervals import spoken_price

__all__ = ["section"]

_MEANS = {
    VERIFIED: "“Verified” says that the graph computes what the linearized model computes. "
    "It does not say that this quality loss is acceptable.",
    COMPARED: "“Compared” says that logits and greedy text are near those of the linearized model. "
    "It proves neither the wiring nor that this quality loss is acceptable.",
}


def section(report: Mapping[str, Any]) -> Section:
    """What the replacement costs, or why that is not known."""
    loss = _loss(report) if report["price"] else (Paragraph(_missing(report)),)
    return Section("Quality loss", (*loss, *_benchmarks(report["quality"])))


def _missing(report: Mapping[str, Any]) -> str:
    said = "The quality loss was not measured"
    if not report["without_original"]:
        return f"{said}."
    return (
        f"{said}: the checkpoint came with its maps, but without the attention weights that the maps replace. "
        "These weights are zeros in the original here. So its speed is that of the original, but its text is not."
    )


def _loss(report: Mapping[str, Any]) -> Iterator[Block]:
    first = report["price"][0]
    yield Paragraph(
        "Measured on held-out text: no map was fitted on this text and no layer was chosen by it. "
        f"Brackets hold a 95% interval over windows of {first['tokens'] // first['windows']} tokens. "
        "Both decoders read the same windows. These figures are reported, not gated. "
        f"{_MEANS.get(report['status'], '')}"
    )
    if report["price_warning"]:
        yield Paragraph(f"Note: {report['price_warning']}.")
    names = ("Tokens (windows)", "Perplexity original", "Perplexity NBL", "Increase", "KL (nats)", "Top-1 agreement")
    yield Table.of((Column("Text", "wrap"), *Column.numbers(*names)), map(_row, report["price"]))
    yield from _uses(report)


def _row(loss: Mapping[str, Any]) -> tuple[str, ...]:
    said = spoken_price(loss)
    ends = (words.number(loss[name], "not finite") for name in ("perplexity_original", "perplexity_nbl"))
    tokens = f"{loss['tokens']:,} ({loss['windows']})"
    return loss["text"], tokens, *ends, said["increase"], said["kl"], said["top1"]


def _uses(report: Mapping[str, Any]) -> Iterator[Block]:
    if not report["texts"]:
        return
    yield Heading("Text by use")
    yield Table.of(
        ("Use", Column("Text", "wrap"), Column("Tokens", "number")),
        [(text["use"], text["text"], f"{text['tokens']:,}") for text in report["texts"]],
    )
    distilled = ", including those of distillation," if report["fit"] == "distilled" else ""
    yield Paragraph(
        "No token of a text has two uses, with two exceptions. "
        "Training also reads the text that the maps are fitted on. "
        "One part of the text judges both the choice of layers and the training. "
        f"The tool's defaults{distilled} were tried with SmolLM2-135M on C4, WikiText-2, news, text of the package "
        "exllamav3 and other parts of Python's documentation. On such text they may look better than elsewhere."
    )


def _benchmarks(quality: Mapping[str, Any] | None) -> Iterator[Block]:
    if not quality:
        return
    yield Heading("Benchmarks")
    yield Paragraph(
        f"lm-evaluation-harness {quality['lm_eval']} on the exported graphs, or on the torch models in rows that say "
        "“torch”. ± is one standard error. The difference is NBL − original on the same items, with the error of the "
        "paired difference."
    )
    columns: tuple[Column | str, ...] = (
        "Task",
        "Metric",
        *Column.numbers("Items", "Original", "NBL", "Difference"),
    )
    yield Table.of(columns, [row for found in quality["table"] for row in _scores(found)])


def _scores(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for the graphs and one for the torch models, if either was measured."""
    metric = f"{found['metric'].replace('_', ' ')} {'↑' if found['higher_is_better'] else '↓'}"
    for prefix, name in (("", found["task"]), ("torch-", f"{found['task']}, torch")):
        before, after = (found["figures"].get(f"{prefix}{variant}") for variant in ("original", "nbl"))
        if before or after:
            paired = next((d for d in found["differences"] if d["new"] == f"{prefix}nbl"), None)
            figures = (words.figure(before), words.figure(after), words.signed(paired))
            yield name, metric, f"{found['items']:,}", *figures
