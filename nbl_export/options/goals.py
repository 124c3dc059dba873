"""Reads the request for a plan: a count of layers, named layers, or a limit on quality.

--layers 8                        how many layers, or which layers
--max-perplexity-increase 5%      as many layers as raise perplexity on held-back text by at most 5%
"""

from __future__ import annotations

import math
import re

from nbl_export.errors import NblError, UsageError
from nbl_export.options.options import JobOptions
from nbl_export.records.decoder import DecoderSpec

__all__ = [
    "DEFAULT_INCREASE",
    "DEFAULT_SELECT",
    "DEFAULT_STEPS",
    "asked_increase",
    "asked_layers",
    "default_minutes",
    "names_layers",
    "parse_layers",
    "read_layers",
]

DEFAULT_INCREASE = 0.05  # of perplexity, if neither a count nor a goal is given
DEFAULT_SELECT = "efficient"  # the order of layers, if the model's output can judge
DEFAULT_STEPS = 320  # of a training, if neither steps nor minutes are given and no limit on quality
_USUAL_MINUTES = 10.0
_USUAL_PARAMETERS = 135e6


def asked_increase(options: JobOptions) -> float:
    """Most relative increase of perplexity that the options allow.

    Raises:
        UsageError: the limit cannot be read.
    """
    text = options.max_perplexity_increase
    if text is None:
        return DEFAULT_INCREASE
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text.strip(), re.ASCII)
    if not found:
        raise UsageError(f"--max-perplexity-increase {text!r} is not a percentage; write 5%")
    if not found[2] and float(found[1]) < 1:
        share = f"{float(found[1]) * 100:g}%"
        percent = f"{found[1]}%"
        raise UsageError(f"--max-perplexity-increase {text!r} may mean {share} or {percent}; write one of them")
    return float(found[1]) / 100


def default_minutes(parameters: int) -> float:
    """How long maps are trained for a limit on quality, by the model's size: 10 minutes at 135M, 19 at 500M."""
    return _USUAL_MINUTES * math.sqrt(parameters / _USUAL_PARAMETERS)


def read_layers(text: str) -> int | tuple[tuple[int, int], ...]:
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
        low = int(first)
        high = int(last) if dash else int(first)
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
    asked = read_layers(text)
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
    return text is not None and not isinstance(read_layers(text), int)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
