"""Tables of lossless decoding, made from raw results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from tables_speed import cell, level, spoken

from nbl_export.records.paired import paired_ratio

Rows = list[Sequence[str]]
Read = Callable[[str], Any]
_RUNS = {
    "SmolLM2, float32": "lossless-smollm2-fp32",
    "SmolLM2, fp16": "lossless-smollm2-fp16",
    "SmolLM2, int8": "lossless-smollm2-int8",
    "SmolLM2, int4": "lossless-smollm2-int4",
    "Qwen, float32": "lossless-qwen-fp32",
}
_KINDS = ("prose", "code", "chat", "summary")


def lossless(read: Read) -> Rows:
    """For each decoder, the fastest proposer of each draft: acceptance, and speed by kind of prompt."""
    runs = {title: read(name) for title, name in _RUNS.items()}
    kind = level(best for run in runs.values() for best in run["overall"])
    titles = ("decoder", "proposer", "equal answers", f"whole answers ({kind})", *_KINDS, "accepted", "tokens a step",
              "prefill")  # fmt: skip
    rows: Rows = [titles, "ll" + "r" * (len(titles) - 2)]
    for title, run in runs.items():
        for best in run["overall"]:
            kinds = {r["kind"]: r for r in run["rows"] if r["proposer"] == best["proposer"]}
            rows.append((
                title, best["proposer"], f"{best['equal']} of {best['prompts']}", cell(best),
                *(cell(kinds[k]) for k in _KINDS), f"{100 * best['acceptance']:.0f}%",
                f"{best['tokens_per_round']:.2f}", f"×{best['prefill_ratio']:.2f}",
            ))  # fmt: skip
    return rows


def tokens(read: Read) -> Rows:
    """Answers of 128 tokens beside the original's, by kind of prompt."""
    run = read("lossless-tokens-smollm2")
    rows: Rows = [("prompts", "equal answers", "accepted", "decode", "whole answer", "interval"), "lrrrrl"]
    for row in (*run["rows"], *run["overall"]):
        rows.append((
            row["kind"], f"{row['equal']} of {row['prompts']}", f"{100 * row['acceptance']:.0f}%",
            f"×{row['decode_ratio']:.2f}", cell(row), level([row]).replace("loads", "answers"),
        ))  # fmt: skip
    return rows


def prefill(read: Read) -> Rows:
    """Prefill of 2,048 tokens in original/ and in lossless/."""
    found = read("lossless-tokens-smollm2")["prefill_seconds"]
    ratio = paired_ratio(found["original"], found["lossless"], range(len(found["original"])))
    shown = (f"{statistics.median(found[name]):.2f} s" for name in ("original", "lossless"))
    return [("original/", "lossless/", f"speed of lossless/ ({ratio.interval})"), "rrr", (*shown, spoken(ratio))]
