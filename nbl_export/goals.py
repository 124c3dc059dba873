"""What may be asked of a plan, read and refused before any work: a count or one goal, a method, a rank.

--layers 8                        how many, or which
--max-perplexity-increase 5%      as many as raise perplexity on held-back text by at most that
--target-speedup 1.3[@decode]     as few as bring the modelled speed-up (`cost`), of prefill or of decode
--kv-budget 64MiB@4096            as few as make the caches of 4096 tokens fit; without @ those of one token
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from nbl_export.errors import NblError, UsageError
from nbl_export.records import DecoderSpec, JobOptions

__all__ = [
    "GOALS",
    "CacheBudget",
    "PerplexityIncrease",
    "TargetSpeedup",
    "changed_options",
    "check_request",
    "check_size",
    "goal_inputs",
    "goal_of",
    "read_rank",
]

GOALS = ("max_perplexity_increase", "target_speedup", "kv_budget")
_PHASES = ("prefill", "decode")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class PerplexityIncrease:
    """Share by which perplexity may rise."""

    share: float


@dataclass(frozen=True)
class TargetSpeedup:
    """Factor that the modelled cost of a phase ("prefill" or "decode") falls by."""

    factor: float
    phase: str


@dataclass(frozen=True)
class CacheBudget:
    """Bytes that the caches of one sequence of so many tokens may take."""

    size_bytes: float
    tokens: int


Goal = PerplexityIncrease | TargetSpeedup | CacheBudget


def goal_of(options: JobOptions) -> Goal | None:
    """Read the goal, if one is given.

    Raises:
        UsageError: it cannot be read.
    """
    if options.max_perplexity_increase is not None:
        return _read_increase(options.max_perplexity_increase)
    if options.target_speedup is not None:
        return _read_speedup(options.target_speedup)
    return None if options.kv_budget is None else _read_budget(options.kv_budget)


def goal_inputs(options: JobOptions) -> list[Any]:
    """Options that decide what a goal or a choice by the work saved amounts to, beside the request itself."""
    if options.target_speedup is None and options.kv_budget is None:
        return [options.kept_logits] if options.select in (None, "efficient") else []
    return [options.engine, options.provider, options.precision, options.prompt_length, options.kept_logits]


def changed_options(options: JobOptions, changes: dict[str, Any]) -> JobOptions:
    """Options with changes; a count or goal among them takes the place of the one before."""
    given = {name: value for name, value in changes.items() if value is not None}
    asked = ("layers", *GOALS)
    if any(name in given for name in asked):
        given = {**dict.fromkeys(asked), **given}
    return dataclasses.replace(options, **given)


def check_request(options: JobOptions) -> None:
    """Refuse options that contradict each other or cannot be read, whatever the model.

    Raises:
        UsageError: which, and what to do.
    """
    asked = [_flag(name) for name in ("layers", *GOALS) if getattr(options, name) is not None]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)} both say how far to go; give one of them")
    goal_of(options)
    if options.method == "wo-wv" and options.tap != "normed":
        raise UsageError("--method wo-wv is attention on a layer's normed input; add --tap normed")
    if options.method != "nbl" and options.fit == "distilled":
        raise UsageError(f"--fit distilled trains fitted maps, --method {options.method} has none; leave out one")
    rank = read_rank(options.rank)
    if rank is not None and (options.method != "nbl" or options.fit == "distilled"):
        other = "--fit distilled" if options.method == "nbl" else f"--method {options.method}"
        raise UsageError(f"--rank is for maps fitted in closed form; leave out --rank or {other}")


def check_size(options: JobOptions, spec: DecoderSpec) -> None:
    """Hold what is asked against the decoder.

    Raises:
        NblError: a rank beyond the hidden size.
    """
    rank = read_rank(options.rank)
    if isinstance(rank, int) and rank > spec.hidden_size:
        raise NblError(f"--rank {rank} is beyond the model's hidden size of {spec.hidden_size}")


def read_rank(text: str | None) -> int | str | None:
    """Read `--rank`: a number, "auto", or None for full maps.

    Raises:
        UsageError: it is neither.
    """
    if text is None or text == "auto":
        return text
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise UsageError(f"--rank {text!r} is neither a number from 1 on nor auto")
    return int(text)


def _read_increase(text: str) -> PerplexityIncrease:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip(), re.ASCII)
    if not found:
        raise UsageError(f"--max-perplexity-increase {text!r} is not a percentage; write 5%")
    return PerplexityIncrease(float(found[1]) / 100)


def _read_speedup(text: str) -> TargetSpeedup:
    number, _, phase = text.strip().partition("@")
    if not re.fullmatch(r"\d+(\.\d+)?", number, re.ASCII) or float(number) <= 1 or (phase or "prefill") not in _PHASES:
        raise UsageError(f"--target-speedup {text!r} is not a factor above 1; write 1.3 (of prefill) or 1.3@decode")
    return TargetSpeedup(float(number), phase or "prefill")


def _read_budget(text: str) -> CacheBudget:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B)?(?:@(\d+))?", text.strip().upper(), re.ASCII)
    if not found or not float(found[1]) or found[3] == "0":
        raise UsageError(f"--kv-budget {text!r} is not a size; write 64MiB@4096 (of 4096 tokens) or 15KiB (of one)")
    return CacheBudget(float(found[1]) * _UNITS[found[2] or ""], int(found[3] or 1))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
