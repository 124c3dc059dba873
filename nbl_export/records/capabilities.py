"""What differs between engines, as data; and who proposes tokens in lossless decoding, and how many at once.

    ngram   what followed the last tokens earlier in the text
    int4    the original model with int4 matrices
    nbl     the NBL model with int4 matrices

The original decides every token, so a proposer changes the speed alone (Leviathan, Kalman and Matias, 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "AUTO",
    "DRAFTS",
    "GENAI_PROPOSERS",
    "MOST_ROWS",
    "OPENVINO_PROPOSERS",
    "Capabilities",
    "Proposer",
    "proposers_of",
]


AUTO = "auto"
DRAFTS = ("ngram", "int4", "nbl", AUTO)  # values of --draft
_MOST_DRAFTED = 16  # ONNX Runtime GenAI proposes at most 16 tokens
MOST_ROWS = _MOST_DRAFTED + 1  # positions that the original computes to verify them: one more than proposed tokens


@dataclass(frozen=True)
class Capabilities:
    """What differs between engines; no other code asks for an engine's name.

    Attributes:
        precisions: values of `--precision`, the default first.
        sources: decoder source -> the precisions that it makes for the engine, the default source first.
        every_expert: decoder sources whose graphs compute every expert for every token.
        extra: optional extra that installs the engine.
        cache_bytes: precision -> bytes of a cache element; 4 if it is not named.
        mapped: decoder source -> the precisions whose export leaves the weights in the checkpoint's files.
        rounded: of these, the precisions whose export holds one matrix in float32 at a time.
        narrow: whether the engine computes in fewer bits than the graph's types state, unless the precision is fp32.
        static: whether the engine compiles graphs of the static form, with caches of --max-seq-len slots. A CPU
            verifies such a graph through its float32 twin (a float32 copy). The build stage makes the engine that runs.
        profiled: whether operators can be timed.
        cross: whether exports may be for another machine; bench is left out if the engine does not run here.
        dense_caches: whether caches count 0..K-1.
        provider: ONNX Runtime's execution provider, which the exporter is told.
        providers: ONNX Runtime's other execution providers, which the engine can run with.
        windows: whether its decoders hold layers that read the last tokens alone (`--window-layers`).
        hybrids: whether its decoders hold the states of layers without attention. recurrences: also matrices that
            every token changes.
        measures_limits: whether roofs of the machine can be measured for the engine.
        proven_by: the engine that verifies the graphs; "" is the engine itself.
        last_rows: whether the graph that verifies proposed tokens gives logits of the last positions alone.
        reads: the form of `convert` whose files the engine runs; "" if it runs its own decoders.
        proposers: who can propose tokens that the engine verifies (`--draft`); empty if nobody can.
    """

    name: str
    title: str
    precisions: tuple[str, ...]
    sources: Mapping[str, tuple[str, ...]]
    extra: str
    cache_bytes: Mapping[str, int] = field(default_factory=dict)
    mapped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rounded: tuple[str, ...] = ()
    narrow: bool = False
    static: bool = False
    profiled: bool = False
    cross: bool = False
    dense_caches: bool = False
    provider: str = "cpu"
    providers: tuple[str, ...] = ()
    every_expert: tuple[str, ...] = ()
    windows: bool = False
    hybrids: bool = False
    recurrences: bool = False
    measures_limits: bool = False
    proven_by: str = ""
    last_rows: bool = False
    reads: str = ""
    proposers: tuple[Proposer, ...] = ()

    @property
    def source(self) -> str:
        """The default decoder source."""
        return next(iter(self.sources))

    def cache_itemsize(self, precision: str) -> int:
        """Bytes of a cache element."""
        return self.cache_bytes.get(precision, 4)


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
