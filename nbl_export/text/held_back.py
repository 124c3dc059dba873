"""Divides text by purpose. Each window has one purpose, so no final figure is measured on text that chose something.

    calibration text   | maps are fitted on | deciding | choosing | deciding | final | final | distillation goes on |
    second text        | unused | deciding | choosing | choosing | final |

second     text that nobody calibrates on
choosing   chooses layers (`--select greedy|efficient`), and judges distilled maps
deciding   decides how many layers a goal takes; the sweep and its recommendation use this part too
final      gives the figures of `verify`, the report and the card; no choice uses this part
unused     was read while the tool's defaults were chosen; the second text's final part was not

A part is a run of windows: 4,096 tokens of the calibration text, or 8,192 of the second text, rounded up to windows. Of
a short calibration text an eighth is held back, and at least three windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "CALIBRATION_ROLES",
    "DIVISION",
    "FEWEST_WINDOWS",
    "SECOND_ROLES",
    "Division",
    "divide",
    "held_back_tokens",
    "judging",
    "second_tokens",
    "spread",
]

CALIBRATION_ROLES = ("deciding", "choosing", "deciding", "final", "final")
SECOND_ROLES = ("unused", "deciding", "choosing", "choosing", "final")
_PART_TOKENS: dict[tuple[str, ...], int] = {CALIBRATION_ROLES: 4096, SECOND_ROLES: 8192}
_JUDGING_TOKENS = 2048
FEWEST_WINDOWS = 3  # one for each purpose
DIVISION = [[roles, tokens] for roles, tokens in _PART_TOKENS.items()]  # in the key of a stage that reads a part


@dataclass(frozen=True)
class Division:
    """Token ids [windows, context] by purpose; no window has two purposes."""

    deciding: Any
    choosing: Any
    final: Any


def held_back_tokens(context: int) -> int:
    """Tokens of the calibration text that no map is fitted on or trained on, in whole windows."""
    return _tokens(CALIBRATION_ROLES, context)


def second_tokens(context: int) -> int:
    """Tokens of the second text, which nobody calibrates on, in whole windows."""
    return _tokens(SECOND_ROLES, context)


def _tokens(roles: tuple[str, ...], context: int) -> int:
    return len(roles) * -(-_PART_TOKENS[roles] // context) * context


def divide(windows_WT: Any, roles: Sequence[str]) -> Division:
    """Give each window to one role, run by run in the order of the text.

    Args:
        windows_WT: a tensor or array of at least `FEWEST_WINDOWS` windows.
    """
    count = len(windows_WT)
    given = [roles[k * len(roles) // count] for k in range(count)]
    return Division(*(
        windows_WT[[k for k in range(count) if given[k] == role]] for role in ("deciding", "choosing", "final")
    ))  # fmt: skip


def judging(part: Division) -> Any:
    """The choosing windows of the calibration text that layers are chosen by; the second text adds as many.

    Losses of two layers are compared token by token, so few tokens give their order. Each token costs a pass of every
    candidate.
    """
    context = part.choosing.shape[1]
    return part.choosing[: max(1, _JUDGING_TOKENS // context)]


def spread(windows_WT: Any, count: int) -> Any:
    """At most `count` windows, spread evenly from the first to the last."""
    count, last = min(count, len(windows_WT)), len(windows_WT) - 1
    return windows_WT[[k * last // max(1, count - 1) for k in range(count)]]
