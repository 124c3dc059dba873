"""Decoding by the original, to which something cheaper proposes tokens; lossless in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nbl_export.measure.lossless import decoding, equal_answers
from nbl_export.measure.paired import exact_level, spoken_level
from nbl_export.measure.rows import spoken_ratio
from nbl_export.report import words
from nbl_export.report.blocks import (
    Column,
    Details,
    Paragraph,
    Section,
    Table,
)

__all__ = ["sections", "table"]

_KINDS = {
    "prose": "prose, to go on with",
    "code": "code, to go on with",
    "chat": "a question",
    "summary": "a text to summarise",
    "all": "all",
}


def sections(report: Mapping[str, Any]) -> tuple[Section, ...]:
    """One section, or none if no proposer was asked for."""
    found = report.get("lossless")
    if not found:
        return ()
    note = Paragraph(" ".join(_note(found, report["precision"])))
    trial = Table.of(
        (Column("Tokens proposed by", "wrap"), *Column.numbers("Speed over plain decoding, one round")),
        [(row["proposer"], spoken_ratio(row["ratio"])) for row in found["trial"]],
    )
    title = decoding(report["precision"]).capitalize()
    return (Section(title, (note, table(found), Details("The trial of all proposers", (trial,)))),)


def table(found: Mapping[str, Any]) -> Table:
    """The figures of lossless.json, by proposer and kind of prompt."""
    numbers = ("Accepted", "Tokens per step", "Prefill", "Decode", "Whole answer", "Interval", "Equal answers")
    columns: tuple[Column | str, ...] = (
        Column("Tokens proposed by", "wrap"), Column("Prompt", "wrap"), *Column.numbers(*numbers)
    )  # fmt: skip
    return Table.of(columns, [_row(row) for row in (*found["rows"], *found["overall"])])


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    accepted = "–" if row["acceptance"] is None else words.percent(row["acceptance"])
    return (
        row["proposer"],
        _KINDS[row["kind"]],
        accepted,
        "–" if row["tokens_per_round"] is None else f"{row['tokens_per_round']:.2f}",
        f"×{spoken_ratio(row['prefill_ratio'])}",
        f"×{spoken_ratio(row['decode_ratio'])}",
        row["verdict"] if row["low"] <= 1 <= row["high"] else f"×{spoken_ratio(row['ratio'])}",
        f"{spoken_ratio(row['low'])} to {spoken_ratio(row['high'])}",
        f"{row['equal']} of {row['prompts']}",
    )


def _note(found: Mapping[str, Any], precision: str) -> Iterator[str]:
    best = found["overall"][0]
    yield "The folder lossless/ holds the original decoder, which decides every token, and proposes tokens to it."
    if found["pays"]:
        yield f"The fastest proposer is {best['proposer']}: ×{spoken_ratio(best['ratio'])} of plain decoding."
    else:
        yield f"Speculation does not pay here: the fastest proposer, {best['proposer']}, is not faster by its interval."
        yield "Use original/ instead, or measure with prompts like your own."
    yield "Each factor is speed over plain decoding; that of a whole answer counts the prompt, which a draft reads too."
    level = spoken_level(exact_level(best["loads"]))
    yield f"Intervals of {best['loads']} loads contain the true median in {level} of all cases."
    yield f"Plain decoding gives {best['plain_tokens_per_second']:.1f} tokens a second."
    yield f"Answers have up to {found['new_tokens']} tokens. In this run {equal_answers(best)} equal plain decoding's."
    if precision == "fp32":
        yield "Sampling keeps the original's distribution."
    else:
        yield (
            f"Kernels of {precision} round steps of one and of several tokens differently, so these answers are not "
            "lossless."
        )
    if found["differences"]:
        worst = max(d["margin"] for d in found["differences"])
        yield (
            f"{len(found['differences'])} answers leave the original's at a near-tie: there its two best logits are at "
            f"most {worst:.2g} apart."
        )
