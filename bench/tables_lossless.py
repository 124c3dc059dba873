"""Tables of lossless decoding, made from raw results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Rows = list[Sequence[str]]
Read = Callable[[str], Any]
_RUNS = {
    "SmolLM2, float32": "lossless-smollm2-fp32",
    "SmolLM2, int8": "lossless-smollm2-int8",
    "SmolLM2, int4": "lossless-smollm2-int4",
}
_KINDS = ("prose", "code", "chat", "summary")


def lossless(read: Read) -> Rows:
    """For each decoder, the fastest proposer of each draft: acceptance, and speed by kind of prompt."""
    titles = (
        "decoder",
        "proposer",
        "accepted",
        "tokens a step",
        "prefill",
        *_KINDS,
        "all",
        "interval",
        "equal answers",
    )
    rows: Rows = [titles, "ll" + "r" * (len(titles) - 2)]
    for title, name in _RUNS.items():
        run = read(name)
        for best in run["overall"]:
            kinds = {r["kind"]: r for r in run["rows"] if r["proposer"] == best["proposer"]}
            rows.append((
                title, best["proposer"], f"{100 * best['acceptance']:.0f}%", f"{best['tokens_per_round']:.2f}",
                f"×{best['prefill_ratio']:.2f}", *(f"×{kinds[k]['ratio']:.2f}" for k in _KINDS),
                f"×{best['ratio']:.2f}", f"{best['low']:.2f} to {best['high']:.2f}",
                f"{best['equal']} of {best['prompts']}",
            ))  # fmt: skip
    return rows
