"""What another shape could reach on another machine (`roofline.project`), for the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from nbl_export import roofline
from nbl_export.artifacts import RunDirectory
from nbl_export.errors import NblError, UsageError
from nbl_export.plan import parse_layers
from nbl_export.speed import spoken_ratio

__all__ = ["Request", "rows", "table"]

_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")


@dataclass(frozen=True)
class Request:
    """shape: of `roofline.SHAPES`. tflops: 10^12 operations a second. bandwidth: 10^9 bytes a second. depth: tokens in
    the cache, comma separated. like: a run whose benchmark says how near to its limits a decoder comes."""

    shape: str
    layers: str
    tflops: float
    bandwidth: float
    precision: str = "fp16"
    prompt_tokens: int = 512
    depth: str = "0,2048"
    like: Path | None = None


def rows(asked: Request) -> list[dict[str, Any]]:
    """The rows of `roofline.project`: each depth's prefill, then each depth's decode.

    Raises:
        NblError: no such shape or layers; the run has no measured share of its limits. UsageError: an option.
    """
    if asked.shape not in roofline.SHAPES:
        raise NblError(f"no shape is called {asked.shape!r}; there are {', '.join(roofline.SHAPES)}")
    if asked.precision not in _PRECISIONS:
        raise UsageError(f"--precision is one of {', '.join(_PRECISIONS)}, not {asked.precision!r}")
    for name in ("tflops", "bandwidth"):
        if not (math.isfinite(rate := getattr(asked, name)) and rate > 0):
            raise UsageError(f"--{name} {rate:g} is no rate; give a number above 0")
    replaced = parse_layers(asked.layers, roofline.SHAPES[asked.shape][0].num_layers)
    if isinstance(replaced, int):
        raise UsageError(
            f"--layers {asked.layers} is a count, and nothing is known to choose by; name the layers: 24-31"
        )
    machine = roofline.MachineRates.given(1e12 * asked.tflops, 1e9 * asked.bandwidth)
    return roofline.project(
        asked.shape, replaced, machine, asked.precision, tokens=asked.prompt_tokens, depths=_depths(asked),
        shares=None if asked.like is None else _shares(asked.like),
    )  # fmt: skip


def _depths(asked: Request) -> list[int]:
    positions = roofline.SHAPES[asked.shape][0].max_positions
    try:
        depths = [int(part) for part in asked.depth.split(",")]
    except ValueError as error:
        raise UsageError(f"--depth {asked.depth!r} is not numbers of tokens, comma separated") from error
    for depth in depths:
        if not 0 <= depth <= positions - asked.prompt_tokens:
            raise UsageError(
                f"--depth {depth} with --prompt-tokens {asked.prompt_tokens} is not within the {positions} positions "
                f"of {asked.shape}"
            )
    return depths


def _shares(directory: Path) -> dict[str, float]:
    """Efficiency of prefill and of decode in a run's benchmark."""
    run = RunDirectory.peek(directory)
    if not run.manifest:
        raise NblError(f"{directory} is not a run directory: it has no nbl.json; nbl-export --output makes one")
    if "bench" in run.stages:
        run.check("bench")
    limits = run.read_json("bench.json").get("limits") if "bench" in run.stages else None
    if not limits:
        raise NblError(
            f"{directory} has no measured share of what its machine allows; run nbl-export bench {directory}"
        )
    shares = roofline.efficiencies([row for limit in limits for row in limit["rows"]])
    missing = {"prefill", "decode"} - shares.keys()
    if missing:
        raise NblError(f"{directory} has measured no {' and no '.join(sorted(missing))}; bench it with both")
    return shares


def table(found: list[dict[str, Any]]) -> Table:
    """For people. At most: the limit; expected: the limit times the efficiency that was measured elsewhere."""
    first = found[0]
    title = f"{first['shape']} in {first['precision']}, {len(first['replaced_layers'])} layers replaced: a projection"
    made = Table("test", "bound by", "original, at most", "NBL, at most", "ratio", title=title)
    expected = "expected_tokens_per_second" in first
    if expected:
        made.add_column("original, expected")
        made.add_column("NBL, expected")
    for row in found:
        what = f"prefill of {row['tokens']}" if row["phase"] == "prefill" else "decode"
        cells = [f"{what} after {row['depth']}" if row["depth"] else what, row["bound"]]
        cells += [_speed(row["limit_tokens_per_second"][name]) for name in ("original", "nbl")]
        cells.append(spoken_ratio(row["ratio"]))
        cells += [_speed(row["expected_tokens_per_second"][name]) for name in ("original", "nbl") if expected]
        made.add_row(*cells)
    return made


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f} tok/s" if tokens_per_second >= 99.5 else f"{tokens_per_second:.1f} tok/s"
