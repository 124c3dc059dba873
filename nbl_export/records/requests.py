"""The request of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nbl_export.errors import UsageError

__all__ = ["PERPLEXITY", "EvalRequest", "Subject"]

PERPLEXITY = "perplexity"  # what is measured on a text, beside the tests of `evaluation.length`
_TOKENS = 512  # of a window for perplexity, as in `verify`
_LONG_TOKENS = 4096


@dataclass(frozen=True)
class EvalRequest:
    """What to measure.

    texts, long_texts: (name, file) pairs, for perplexity and for quality at length. context: tokens of their windows;
    None is the default of each, see `window` and `long_window`.
    """

    tasks: tuple[str, ...] = ()
    limit: int | None = None
    texts: tuple[tuple[str, str], ...] = ()
    long_texts: tuple[tuple[str, str], ...] = ()
    context: int | None = None

    def __post_init__(self) -> None:
        if not (self.tasks or self.texts or self.long_texts):
            raise UsageError("nothing to evaluate: give --tasks, --perplexity or --long-context")

    @property
    def window(self) -> int:
        """Tokens of a window for perplexity."""
        return self.context or _TOKENS

    def long_window(self, positions: int) -> int:
        """Tokens of a window for quality at length, for a model with this many positions."""
        return self.context or min(_LONG_TOKENS, positions)


@dataclass(frozen=True)
class Subject:
    """A task or a text, loaded and checked, by its name in eval.json.

    `asked` holds everything that the figures depend on.
    """

    name: str
    value: Any
    limit: int | None
    data: dict[str, Any]
    config: dict[str, Any]

    @property
    def asked(self) -> list[Any]:
        data = self.data.get("sha256", self.data)  # a file counts by content, not by path
        return [self.name, self.limit, data, self.config]
