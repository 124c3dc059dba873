"""The request of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import UsageError

__all__ = ["PERPLEXITY", "VARIANTS", "EvalRequest", "Prepared", "Subject"]

PERPLEXITY = "perplexity"  # what is measured on a text, beside the tests of `evaluation.length`
VARIANTS = ("original", "nbl", "torch-original", "torch-nbl")  # in running order
_TOKENS = 512  # of a window for perplexity, as in `verify`
_LONG_TOKENS = 4096


@dataclass(frozen=True)
class EvalRequest:
    """What to measure.

    shots: examples in a prompt of a task; None is the task's own number. texts, long_texts: (name, file) pairs, for
    perplexity and for quality at length. context: tokens of their windows; None is the default of each, see `window`
    and `long_window`.
    """

    tasks: tuple[str, ...] = ()
    variants: tuple[str, ...] = ("original", "nbl")
    limit: int | None = None
    data: Path | None = None
    shots: int | None = None
    texts: tuple[tuple[str, str], ...] = ()
    long_texts: tuple[tuple[str, str], ...] = ()
    context: int | None = None

    def __post_init__(self) -> None:
        if not (self.tasks or self.texts or self.long_texts):
            raise UsageError("nothing to evaluate: give --tasks, --perplexity or --long-context")
        unknown = [v for v in self.variants if v not in VARIANTS]
        if unknown or not self.variants:
            raise UsageError(f"key variants takes {', '.join(VARIANTS)}, not {unknown[0] if unknown else 'nothing'!r}")

    @property
    def window(self) -> int:
        """Tokens of a window for perplexity."""
        return self.context or _TOKENS

    def long_window(self, positions: int) -> int:
        """Tokens of a window for quality at length, for a model with this many positions."""
        return self.context or min(_LONG_TOKENS, positions)


@dataclass(frozen=True)
class Subject:
    """A benchmark or a text, by its name in eval.json. `asked` holds everything that the figures depend on."""

    name: str
    value: Any
    limit: int | None
    data: dict[str, Any]
    config: dict[str, Any]

    @property
    def asked(self) -> list[Any]:
        data = self.data.get("sha256", self.data)  # a file counts by content, not by path
        return [self.name, self.limit, data, self.config]


@dataclass(frozen=True)
class Prepared:
    """A request with its benchmarks and texts loaded and checked."""

    request: EvalRequest
    subjects: tuple[Subject, ...]
    harness: str

    def harness_of(self, subject: Subject) -> str:
        """The harness' version if the subject is a benchmark; "" for a text."""
        return self.harness if subject.name in self.request.tasks else ""

    @property
    def identity(self) -> list[Any]:
        """Equal for equal requests."""
        return [self.harness, [s.asked for s in self.subjects], list(self.request.variants)]
