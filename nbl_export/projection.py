"""What a run, or another shape, could reach on another machine (`roofline.project`), for the command line."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from nbl_export import cost, reach, roofline
from nbl_export.artifacts import RunDirectory
from nbl_export.errors import NblError, UsageError
from nbl_export.job import Job
from nbl_export.plan import load_maps, parse_layers
from nbl_export.progress import Ui
from nbl_export.records import JobOptions
from nbl_export.speed import spoken_ratio

__all__ = ["Request", "rows", "table"]


@dataclass(frozen=True)
class Request:
    """shape: of `roofline.SHAPES`, or a run directory. layers, precision: those of the run where they are not named.
    tflops: 10^12 operations a second. bandwidth: 10^9 bytes a second. depths: tokens in the cache. like: a run whose
    benchmark says how near to its limits a decoder comes."""

    shape: str
    tflops: float
    bandwidth: float
    layers: str | None = None
    precision: str | None = None
    prompt_tokens: int = 512
    depths: tuple[int, ...] = (0, 2048)
    like: Path | None = None


@dataclass(frozen=True)
class _Decoder:
    name: str
    precision: str
    costs: cost.CostModel
    sizes: dict[int, int]  # of the maps that it has


def rows(asked: Request) -> list[dict[str, Any]]:
    """The rows of `roofline.project`: each depth's prefill, then each depth's decode.

    Raises:
        NblError: no such shape, run or layers; a run has no measured share of its limits. UsageError: an option.
    """
    for name in ("tflops", "bandwidth"):
        if not (math.isfinite(rate := getattr(asked, name)) and rate > 0):
            raise UsageError(f"--{name} {rate:g} is no rate; give a number above 0")
    if asked.precision not in (None, *cost.WEIGHT_BYTES):
        raise UsageError(f"--precision is one of {', '.join(cost.WEIGHT_BYTES)}, not {asked.precision!r}")
    decoder = _of_shape(asked) if asked.shape in roofline.SHAPES else _of_run(asked)
    _check_depths(asked, decoder)
    machine = roofline.MachineRates.given(1e12 * asked.tflops, 1e9 * asked.bandwidth)
    return roofline.project(
        decoder.name, decoder.costs, _sizes(asked, decoder), machine, decoder.precision,
        tokens=asked.prompt_tokens, depths=asked.depths, shares=None if asked.like is None else _shares(asked.like),
    )  # fmt: skip


def _of_shape(asked: Request) -> _Decoder:
    precision = asked.precision or "fp16"
    return _Decoder(asked.shape, precision, roofline.shape_costs(asked.shape, precision), {})


def _of_run(asked: Request) -> _Decoder:
    run = RunDirectory.peek(Path(asked.shape))
    if not run.manifest:
        shapes = ", ".join(roofline.SHAPES)
        raise NblError(f"{asked.shape} is neither a run directory nor a shape; the shapes are {shapes}")
    if "rewrite" not in run.stages:
        raise NblError(f"{asked.shape} is not finished: run its command again ({run.manifest['command']})")
    options = JobOptions.from_json(run.manifest["options"])
    options = dataclasses.replace(options, precision=asked.precision or options.precision)
    job = Job(options, run, Ui(quiet=True))
    maps = load_maps(run.path / "maps.safetensors", job.plan.replaced)
    model = run.manifest["model"]
    costs = reach.cost_model(job, run.path / "original")
    return _Decoder(model.get("title") or model["name"], options.precision, costs, cost.map_sizes(maps))


def _sizes(asked: Request, decoder: _Decoder) -> dict[int, int]:
    if asked.layers is None and decoder.sizes:
        return decoder.sizes
    if asked.layers is None:
        raise UsageError("which layers are replaced? --layers 24-31 says it")
    spec = decoder.costs.spec
    replaced = parse_layers(asked.layers, spec.num_layers)
    if isinstance(replaced, int):
        raise UsageError(f"--layers {asked.layers} is a count, and here is nothing to choose by; name them: 24-31")
    return dict.fromkeys(replaced, spec.hidden_size**2)


def _check_depths(asked: Request, decoder: _Decoder) -> None:
    positions = decoder.costs.spec.max_positions
    if max(asked.depths) + asked.prompt_tokens > positions:
        raise UsageError(
            f"--depth {max(asked.depths)} with --prompt-tokens {asked.prompt_tokens} is not within the {positions} "
            f"positions of {decoder.name}"
        )


def _shares(directory: Path) -> dict[str, float]:
    """Efficiency of prefill and of decode in a run's benchmark."""
    run, limits = RunDirectory.existing(directory), None
    if "bench" in run.stages:
        run.check("bench")
        limits = run.read_json("bench.json").get("limits")
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
