"""Who proposes tokens in lossless decoding, and how many at once.

    ngram   what followed the last tokens earlier in the text
    int4    the original model with int4 matrices
    nbl     the NBL model with int4 matrices

The original decides every token, so a proposer changes the speed alone (Leviathan, Kalman and Matias, 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["AUTO", "DRAFTS", "GENAI_PROPOSERS", "MOST_ROWS", "OPENVINO_PROPOSERS", "Proposer", "proposers_of"]

AUTO = "auto"
DRAFTS = ("ngram", "int4", "nbl", AUTO)  # values of --draft
_MOST_DRAFTED = 16  # ONNX Runtime GenAI proposes at most 16 tokens
MOST_ROWS = _MOST_DRAFTED + 1  # positions that the original computes to verify them: one more than proposed tokens


@dataclass(frozen=True)
class Proposer:
    """A draft, and the options of the runtime for it.

    The options are of ONNX Runtime GenAI (`GeneratorParams.set_speculative_options`) or of OpenVINO GenAI
    (`GenerationConfig`).
    """

    draft: str
    options: tuple[tuple[str, int | bool], ...]

    @property
    def name(self) -> str:
        """The proposer in words."""
        said = dict(self.options)
        least, most = said.get("min_adaptive_k"), said.get("max_draft_tokens") or said.get("num_assistant_tokens")
        count = f"{least} or more tokens" if least else f"{most} tokens"
        return f"{self.draft}, {count}{', chained' if said.get('ngram_chained_lookup') else ''}"

    def to_json(self) -> dict[str, Any]:
        """The proposer as JSON values."""
        return {"draft": self.draft, "name": self.name, "options": dict(self.options)}


def _genai(draft: str) -> tuple[Proposer, ...]:
    return (
        Proposer(draft, (("max_draft_tokens", 3),)),
        Proposer(draft, (("max_draft_tokens", 5),)),
        Proposer(draft, (("min_adaptive_k", 3),)),
    )


# Matches of two tokens find most; longer matches are accepted more often. GenAI adapts the width from min_adaptive_k.
GENAI_PROPOSERS = (
    Proposer("ngram", (("ngram_size", 3), ("max_draft_tokens", 4))),
    Proposer("ngram", (("ngram_size", 3), ("max_draft_tokens", 8), ("ngram_chained_lookup", True))),
    Proposer("ngram", (("ngram_size", 3), ("min_adaptive_k", 2), ("cooldown", True))),
    *_genai("int4"),
    *_genai("nbl"),
)
OPENVINO_PROPOSERS = (
    *(Proposer("ngram", (("max_ngram_size", 3), ("num_assistant_tokens", n))) for n in (3, 5)),
    *(Proposer(draft, (("num_assistant_tokens", n),)) for draft in ("int4", "nbl") for n in (3, 5)),
)


def proposers_of(draft: str, known: Sequence[Proposer]) -> tuple[Proposer, ...]:
    """The proposers of an engine that `--draft` asks for; all of them for "auto"."""
    return tuple(p for p in known if draft in (AUTO, p.draft))
