"""Who proposes tokens in lossless decoding, and how many at once.

    ngram   what followed the last tokens earlier in the text
    int4    the original model with int4 matrices
    nbl     the NBL model with int4 matrices

The original decides every token, so a proposer changes the speed alone (Leviathan, Kalman and Matias, 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["AUTO", "DRAFTS", "MOST_ROWS", "PROPOSERS", "Proposer", "proposers_of"]

AUTO = "auto"
DRAFTS = ("ngram", "int4", "nbl", AUTO)  # values of --draft
_MOST_DRAFTED = 16  # ONNX Runtime GenAI proposes at most 16 tokens
MOST_ROWS = _MOST_DRAFTED + 1  # positions that the original computes to verify them: one more than proposed tokens


@dataclass(frozen=True)
class Proposer:
    """A draft, and the options of ONNX Runtime GenAI for it (`GeneratorParams.set_speculative_options`)."""

    draft: str
    options: tuple[tuple[str, int | bool], ...]

    @property
    def name(self) -> str:
        """The proposer in words."""
        said = dict(self.options)
        least = said.get("min_adaptive_k")
        count = f"{least} or more tokens" if least else f"{said['max_draft_tokens']} tokens"
        return f"{self.draft}, {count}{', chained' if said.get('ngram_chained_lookup') else ''}"

    def to_json(self) -> dict[str, Any]:
        """The proposer as JSON values."""
        return {"draft": self.draft, "name": self.name, "options": dict(self.options)}


def _model(draft: str) -> tuple[Proposer, ...]:
    return (
        Proposer(draft, (("max_draft_tokens", 3),)),
        Proposer(draft, (("max_draft_tokens", 5),)),
        Proposer(draft, (("min_adaptive_k", 3),)),
    )


# Matches of two tokens find most; longer matches are accepted more often. GenAI adapts the width from min_adaptive_k.
PROPOSERS = (
    Proposer("ngram", (("ngram_size", 3), ("max_draft_tokens", 4))),
    Proposer("ngram", (("ngram_size", 3), ("max_draft_tokens", 8), ("ngram_chained_lookup", True))),
    Proposer("ngram", (("ngram_size", 3), ("min_adaptive_k", 2), ("cooldown", True))),
    *_model("int4"),
    *_model("nbl"),
)


def proposers_of(draft: str) -> tuple[Proposer, ...]:
    """The proposers that `--draft` asks for; all of them for "auto"."""
    return tuple(p for p in PROPOSERS if draft in (AUTO, p.draft))
