"""What text is read for what: a window has one purpose, so that no final figure is of text that chose something.

    calibration text   | maps are fitted on | deciding | choosing | deciding | final | final | distillation goes on |
    the other text     | unused | deciding | choosing | choosing | final |

choosing   layers are chosen by it (`--select greedy|efficient`), and distilled maps are judged by it
deciding   how many layers a goal takes, and the sweep and what it recommends
final      the figures of `verify`, the report and the card: chose nothing and decided nothing
unused     was looked at while the tool's defaults were chosen; the other text's final part was not

A part is a run of windows: 4,096 tokens of the calibration text, 8,192 of the other, rounded up to windows. Where the
calibration text is short, an eighth of it is held back, three windows at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "DIVISION",
    "FAR_ROLES",
    "FEWEST_WINDOWS",
    "NEAR_ROLES",
    "Division",
    "divide",
    "far_tokens",
    "held_back_tokens",
    "judging",
    "uses_of",
]

NEAR_ROLES = ("deciding", "choosing", "deciding", "final", "final")
FAR_ROLES = ("unused", "deciding", "choosing", "choosing", "final")
_PART_TOKENS: dict[tuple[str, ...], int] = {NEAR_ROLES: 4096, FAR_ROLES: 8192}
_JUDGING_TOKENS = 2048
FEWEST_WINDOWS = 3  # one for each purpose
DIVISION = [[roles, tokens] for roles, tokens in _PART_TOKENS.items()]  # what a stage that reads a part depends on


@dataclass(frozen=True)
class Division:
    """Token ids [windows, context] by purpose; none is in two of them."""

    deciding: Any
    choosing: Any
    final: Any


def held_back_tokens(context: int) -> int:
    """Tokens of the calibration text that no map is fitted on or trained on, in whole windows."""
    return _tokens(NEAR_ROLES, context)


def far_tokens(context: int) -> int:
    """Tokens of the text that nobody calibrates on, in whole windows."""
    return _tokens(FAR_ROLES, context)


def _tokens(roles: tuple[str, ...], context: int) -> int:
    return len(roles) * -(-_PART_TOKENS[roles] // context) * context


def divide(windows_WT: Any, roles: Sequence[str]) -> Division:
    """Give each window to one role, run by run in the order of the text.

    Args:
        windows_WT: a tensor or array of `FEWEST_WINDOWS` windows or more.
    """
    count = len(windows_WT)
    given = [roles[k * len(roles) // count] for k in range(count)]
    return Division(*(
        windows_WT[[k for k in range(count) if given[k] == role]] for role in ("deciding", "choosing", "final")
    ))  # fmt: skip


def judging(part: Division) -> Any:
    """What of the choosing windows layers are chosen by (of the other text as many, spread over them): the losses of
    two layers are compared token by token, so that few tokens order them, and each costs a pass of every candidate."""
    context = part.choosing.shape[1]
    return part.choosing[: max(1, _JUDGING_TOKENS // context)]


def uses_of(job: Any) -> list[dict[str, Any]]:
    """What text a run has read for what, in words, with the number of tokens: the value of "texts" in verify.json.

    Args:
        job: a `job.Job` that has a plan.
    """
    options, near, far = job.options, job.held_back, job.far
    names = [job.text.name, job.far_text.name]
    both = [near] if far is None else [near, far]
    used: list[tuple[str, str, Any]] = [("calibration: scores and maps", names[0], job.windows[0])]
    if options.fit == "distilled":
        used.append(("distillation: training", names[0], job.training_windows))
        used.append(("distillation: judging", names[0], near.choosing))
    if job.plan.select in ("greedy", "efficient"):
        judges = both[:1] if options.data_free else both
        used += [("choice of layers", n, judging(part)) for n, part in zip(names, judges, strict=False)]
    if options.max_perplexity_increase is not None:
        used += [("number of layers", n, part.deciding) for n, part in zip(names, both, strict=False)]
    used += [("final figures", n, part.final) for n, part in zip(names, both, strict=False)]
    return [{"use": use, "text": name, "tokens": int(windows.numel())} for use, name, windows in used]
