"""What another shape could reach on another machine (`roofline.project`), for the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from nbl_export import roofline
from nbl_export.artifacts import RunDirectory
from nbl_export.cost import read_intermediate_size
from nbl_export.errors import NblError, UsageError
from nbl_export.plan import parse_layers
from nbl_export.records import DecoderSpec
from nbl_export.speed import spoken_ratio

__all__ = ["Request", "rows", "table"]

_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")


@dataclass(frozen=True)
class Request:
    """shape: of `roofline.SHAPES`, or a run directory. layers, precision: those of the run where they are not named.
    tflops: 10^12 operations a second. bandwidth: 10^9 bytes a second. depth: tokens in the cache, comma separated.
    like: a run whose benchmark says how near to its limits a decoder comes."""

    shape: str
    layers: str | None
    tflops: float
    bandwidth: float
    precision: str | None = None
    prompt_tokens: int = 512
    depth: str = "0,2048"
    like: Path | None = None


@dataclass(frozen=True)
class _Decoder:
    name: str
    spec: DecoderSpec
    intermediate_size: int
    replaced: tuple[int, ...] = ()
    precision: str = "fp16"


def rows(asked: Request) -> list[dict[str, Any]]:
    """The rows of `roofline.project`: each depth's prefill, then each depth's decode.

    Raises:
        NblError: no such shape, run or layers; a run has no measured share of its limits. UsageError: an option.
    """
    for name in ("tflops", "bandwidth"):
        if not (math.isfinite(rate := getattr(asked, name)) and rate > 0):
            raise UsageError(f"--{name} {rate:g} is no rate; give a number above 0")
    decoder = _decoder(asked.shape)
    precision = asked.precision or decoder.precision
    if precision not in _PRECISIONS:
        raise UsageError(f"--precision is one of {', '.join(_PRECISIONS)}, not {precision!r}")
    machine = roofline.MachineRates.given(1e12 * asked.tflops, 1e9 * asked.bandwidth)
    return roofline.project(
        decoder.name, _replaced(asked, decoder), machine, precision,
        tokens=asked.prompt_tokens, depths=_depths(asked, decoder),
        shares=None if asked.like is None else _shares(asked.like),
        decoder=(decoder.spec, decoder.intermediate_size),
    )  # fmt: skip


def _decoder(shape: str) -> _Decoder:
    if shape in roofline.SHAPES:
        return _Decoder(shape, *roofline.SHAPES[shape])
    run = RunDirectory.peek(Path(shape))
    if not run.manifest:
        raise NblError(f"{shape} is neither a run directory nor a shape; the shapes are {', '.join(roofline.SHAPES)}")
    if "decoder" not in run.stages:
        raise NblError(f"{shape} is not finished: run its command again ({run.manifest['command']})")
    spec = DecoderSpec(**run.manifest["decoder"])
    width = read_intermediate_size(run.path / "original")
    replaced = tuple(run.manifest.get("replaced_layers") or ())
    model = run.manifest["model"]
    return _Decoder(model.get("title") or model["name"], spec, width, replaced, run.manifest["options"]["precision"])


def _replaced(asked: Request, decoder: _Decoder) -> tuple[int, ...]:
    if asked.layers is None and decoder.replaced:
        return decoder.replaced
    if asked.layers is None:
        raise UsageError("which layers are replaced? --layers 24-31 says it")
    replaced = parse_layers(asked.layers, decoder.spec.num_layers)
    if isinstance(replaced, int):
        raise UsageError(
            f"--layers {asked.layers} is a count, and here is nothing to choose by; name the layers: 24-31"
        )
    return replaced


def _depths(asked: Request, decoder: _Decoder) -> list[int]:
    try:
        depths = [int(part) for part in asked.depth.split(",")]
    except ValueError as error:
        raise UsageError(f"--depth {asked.depth!r} is not numbers of tokens, comma separated") from error
    for depth in depths:
        if not 0 <= depth <= decoder.spec.max_positions - asked.prompt_tokens:
            raise UsageError(
                f"--depth {depth} with --prompt-tokens {asked.prompt_tokens} is not within the "
                f"{decoder.spec.max_positions} positions of {decoder.name}"
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
