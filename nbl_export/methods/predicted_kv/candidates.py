"""Which exit layers and numbers of recent tokens may be chosen, and which sums they need."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["ExitCandidates", "Exits", "candidate_exits"]

_MOST = 16  # candidate exit layers: the lowest is at half of the layers, the highest leaves an eighth above it


def candidate_exits(num_layers: int) -> tuple[int, ...]:
    """The exit layers that are calibrated and judged, ascending."""
    low = max(1, num_layers // 2)
    high = max(1, num_layers - max(1, num_layers // 8))
    step = max(1, math.ceil((high - low + 1) / _MOST))
    return tuple(range(low, high + 1, step)) if num_layers > 1 else ()


@dataclass(frozen=True)
class Exits:
    """What sums are of.

    Attributes:
        exits: ascending. length: tokens of a row, which joins windows.
    """

    exits: tuple[int, ...]
    length: int


@dataclass(frozen=True)
class ExitCandidates:
    """Exit layers and numbers of recent tokens.

    Attributes:
        exits: one if it is named, and then nothing is tested.
        recent_choices: numbers of tokens at the end of a prompt that continue.
    """

    exits: tuple[int, ...]
    recent_choices: tuple[int, ...]
    named: bool
    collected: Exits
