"""The verification settings that both graphs of a run share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.plan import Plan
from nbl_export.targets.base import Target

__all__ = ["Setting"]


@dataclass(frozen=True)
class Setting:
    """Target, decoder and plan, and how the graphs were made.

    precision: of the shipped graphs. logits: "last" or "all", of the shipped graphs. slots: most tokens of a sequence.
    nearness: most steps between codes and their matrices; None for another tool's codes. task: takes a title and
    returns a context; its value reports progress.
    """

    engine: Target
    spec: DecoderSpec
    plan: Plan
    precision: str
    logits: str
    slots: int
    nearness: float | None
    task: Callable[[str], AbstractContextManager[Callable[[int, int], None]]]

    @property
    def static(self) -> bool:
        """Whether graphs have the static form, see `targets.base.Capabilities`."""
        return self.engine.capabilities.static

    @property
    def narrow(self) -> bool:
        """Whether the engine computes in bfloat16 with caches of few bits, so that only its own arithmetic differs."""
        return self.engine.capabilities.graphs == "ir" and self.precision != "fp32"
