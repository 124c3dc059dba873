"""Reads and checks the request for a plan before any work: a count or one goal, a method.

--layers 8                        how many layers, or which layers
--max-perplexity-increase 5%      as many layers as raise perplexity on held-back text by at most 5%
--kv-budget 64MiB@4096            as few layers as make the caches of 4096 tokens fit; without @: of one token
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from nbl_export.errors import NblError, UsageError
from nbl_export.options.options import JobOptions, flag_of
from nbl_export.records.decoder import DecoderSpec

__all__ = ["DEFAULT_INCREASE", "DEFAULT_SELECT", "DEFAULT_STEPS", "GOALS", "CacheBudget", "PerplexityIncrease",
           "asked_layers", "check_request", "check_size", "default_minutes", "goal_of",
           "layers_for_budget", "names_layers", "parse_layers"]  # fmt: skip

DEFAULT_INCREASE = 0.05  # of perplexity, if neither a count nor a goal is given
DEFAULT_SELECT = "efficient"  # the order of layers, if the model's output can judge
DEFAULT_STEPS = 320  # of a training, if neither steps nor minutes are given and no limit on quality
GOALS = ("max_perplexity_increase", "kv_budget")
_USUAL_MINUTES, _USUAL_PARAMETERS = 10.0, 135e6
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class PerplexityIncrease:
    """Largest relative increase of perplexity."""

    share: float


@dataclass(frozen=True)
class CacheBudget:
    """Most bytes of the caches of one sequence of `tokens` tokens."""

    size_bytes: float
    tokens: int


Goal = PerplexityIncrease | CacheBudget


def goal_of(options: JobOptions) -> Goal | None:
    """Read the goal, if one is given.

    Raises:
        UsageError: the goal cannot be read.
    """
    if options.max_perplexity_increase is not None:
        return _read_increase(options.max_perplexity_increase)
    return None if options.kv_budget is None else _read_budget(options.kv_budget)


def default_minutes(parameters: int) -> float:
    """How long maps are trained for a limit on quality, by the model's size: 10 minutes at 135M, 19 at 500M."""
    return _USUAL_MINUTES * math.sqrt(parameters / _USUAL_PARAMETERS)


def check_request(options: JobOptions) -> None:
    """Refuse options that contradict each other or cannot be read, for any model.

    Raises:
        UsageError: names the options and the remedy.
    """
    asked = [flag_of(name) for name in ("layers", *GOALS) if getattr(options, name) is not None]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)} both set how many layers are replaced; give one of them")
    if options.layers is not None and _read_layers(options.layers) == 0:
        raise UsageError("--layers 0 replaces nothing; ask for at least 1, or write 0, for the layer of that number")
    goal = goal_of(options)
    if isinstance(goal, PerplexityIncrease) and not goal.share:
        raise UsageError("--max-perplexity-increase 0% allows no replaced layer; allow more, such as 1%")
    if not options.has_bias and options.tap != "normed":
        raise UsageError(f"key maps {options.maps} acts on the normed input; add the key tap = 'normed'")


def _read_layers(text: str) -> int | tuple[tuple[int, int], ...]:
    """Read a count ("8"), or the first and last layer of each range of named layers ("0,7,24-29", or "8,").

    Raises:
        UsageError: a part is neither a layer nor a range, a range runs backwards, or a layer is repeated.
    """
    text = text.strip()
    if _is_number(text):
        return int(text)
    ranges: list[tuple[int, int]] = []
    for part in (p.strip() for p in text.rstrip(",").split(",")):
        first, dash, last = part.partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            raise UsageError(
                f"--layers {text!r}: {part!r} is not a layer or a range; write a count (8) or layers from 0 (0,7,24-29)"
            )
        low, high = int(first), int(last) if dash else int(first)
        if high < low:
            raise UsageError(f"--layers {text!r}: the range {part} runs backwards; write {high}-{low}")
        if twice := [max(low, a) for a, b in ranges if low <= b and a <= high]:
            raise UsageError(f"--layers {text!r}: layer {twice[0]} is named twice")
        ranges.append((low, high))
    return tuple(ranges)


def parse_layers(text: str, num_layers: int) -> int | tuple[int, ...]:
    """Read `--layers`: "8" is a count, "0,7,24-29" (or "8,") names layers from 0.

    Raises:
        UsageError: a part is no number, a range runs backwards, or a layer is repeated.
        NblError: a layer is missing, or every layer is named.
    """
    asked = _read_layers(text)
    if isinstance(asked, int):
        if asked >= num_layers:
            raise NblError(_all_refused(f"--layers {asked}", num_layers))
        return asked
    chosen: list[int] = []
    for low, high in asked:
        if high >= num_layers:
            raise NblError(
                f"--layers {text!r}: layer {high} does not exist; this model has layers 0 to {num_layers - 1}"
            )
        chosen.extend(range(low, high + 1))
    if len(chosen) >= num_layers:
        raise NblError(_all_refused(f"--layers {text!r}", num_layers))
    return tuple(sorted(chosen))


def asked_layers(options: JobOptions, spec: DecoderSpec) -> int | tuple[int, ...]:
    """The number of layers, or the named layers, of `--layers`, which is given; raises as `parse_layers`."""
    assert options.layers is not None
    return parse_layers(options.layers, spec.num_layers)


def _all_refused(what: str, count: int) -> str:
    return (
        f"{what} would replace all {count} attention layers; at least one stays, because without attention "
        "no token sees another: ask for at most " + str(count - 1)
    )


def names_layers(text: str | None) -> bool:
    """Whether a request names layers; a count and no request do not.

    Raises:
        UsageError: the request cannot be read.
    """
    return text is not None and not isinstance(_read_layers(text), int)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def layers_for_budget(options: JobOptions, budget: CacheBudget, spec: DecoderSpec, itemsize: int) -> tuple[int, int]:
    """The fewest replaced layers whose caches fit a budget, at least 1, and the bytes of the caches that stay.

    Args:
        itemsize: bytes of a cache element.

    Raises:
        NblError: the caches of the original fit already, or those of a single attention layer do not.
    """
    layer_bytes = spec.cache_bytes_per_token(1, itemsize) * budget.tokens
    layers = spec.num_layers
    kept = min(layers, int(budget.size_bytes // layer_bytes))
    of, asked = f"{budget.tokens} tokens" if budget.tokens > 1 else "a token", f"--kv-budget {options.kv_budget}"
    if kept < 1:
        raise NblError(
            f"{asked} cannot be met: with one attention layer left the caches of {of} take "
            f"{layer_bytes:,} bytes, {budget.size_bytes:,.0f} are allowed; allow more or use a smaller --precision"
        )
    if kept == layers:
        raise NblError(
            f"{asked}: the cache already fits, so nothing needs to be replaced (the caches of {of} take "
            f"{kept * layer_bytes:,} bytes, {budget.size_bytes:,.0f} are allowed); ask for less, or leave it out"
        )
    return layers - kept, kept * layer_bytes


def check_size(options: JobOptions, spec: DecoderSpec, itemsize: int) -> None:
    """Check the requested cache budget against the decoder.

    Args:
        itemsize: bytes of a cache element.

    Raises:
        NblError: the budget cannot be met or is met already.
    """
    goal = goal_of(options)
    if isinstance(goal, CacheBudget):
        layers_for_budget(options, goal, spec, itemsize)


def _read_increase(text: str) -> PerplexityIncrease:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text.strip(), re.ASCII)
    if not found:
        raise UsageError(f"--max-perplexity-increase {text!r} is not a percentage; write 5%")
    if not found[2] and float(found[1]) < 1:
        share, percent = f"{float(found[1]) * 100:g}%", f"{found[1]}%"
        raise UsageError(f"--max-perplexity-increase {text!r} may mean {share} or {percent}; write one of them")
    return PerplexityIncrease(float(found[1]) / 100)


def _read_budget(text: str) -> CacheBudget:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B)?(?:@(\d+))?", text.strip().upper(), re.ASCII)
    if not found or not float(found[1]) or found[3] == "0":
        raise UsageError(f"--kv-budget {text!r} is not a size; write 64MiB@4096 (of 4096 tokens) or 15KiB (of one)")
    return CacheBudget(float(found[1]) * _UNITS[found[2] or ""], int(found[3] or 1))
