"""What makes a graph slow at reading prompts, in a form that all kinds of graphs share."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BLOCK", "Finding"]

BLOCK = 128  # values that share a scale: smaller blocks cost more scales, larger ones lose more


@dataclass(frozen=True)
class Finding:
    """A trait that slows the reading of prompts.

    Attributes:
        nodes: how many nodes have the trait.
        advice: what to do about it.
    """

    what: str
    nodes: int
    advice: str
