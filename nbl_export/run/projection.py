"""Estimates the speed of a run or of a model shape on another machine (`roofline.project`), for the command line."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.cost import model as cost
from nbl_export.cost import roofline
from nbl_export.errors import NblError, UsageError
from nbl_export.options.goals import parse_layers
from nbl_export.options.options import JobOptions
from nbl_export.plan.maps_file import load_maps
from nbl_export.run.job import Job
from nbl_export.run.progress import Ui
from nbl_export.run_directory import BENCH_FILE, MAPS_FILE, RunDirectory

__all__ = ["Request", "rows"]


@dataclass(frozen=True)
class Request:
    """shape: of `roofline.SHAPES`, or a run directory. layers, precision: None means the run's.

    tflops: 10^12 operations a second. bandwidth: 10^9 bytes a second. depths: tokens in the cache. like: a run whose
    benchmark gives the efficiency, the share of the machine's limits that a decoder reaches.
    """

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
    sizes: dict[int, int]  # replaced layer -> parameters of its map


def rows(asked: Request) -> list[dict[str, Any]]:
    """The rows of `roofline.project` with the decoder's name as "shape": prefill at each depth, then decode at each.

    Raises:
        NblError: there is no such shape, run or layer, or a run has no measured efficiency.
        UsageError: an option has a wrong value.
    """
    for name in ("tflops", "bandwidth"):
        if not (math.isfinite(rate := getattr(asked, name)) and rate > 0):
            raise UsageError(f"--{name} {rate:g} is not a rate; give a number above 0")
    if asked.precision not in (None, *cost.WEIGHT_BYTES):
        raise UsageError(f"--precision is one of {', '.join(cost.WEIGHT_BYTES)}, not {asked.precision!r}")
    decoder = _of_shape(asked) if asked.shape in roofline.SHAPES else _of_run(asked)
    _check_depths(asked, decoder)
    machine = roofline.MachineRates.given(1e12 * asked.tflops, 1e9 * asked.bandwidth)
    found = roofline.project(
        decoder.costs, _sizes(asked, decoder), machine, decoder.precision,
        tokens=asked.prompt_tokens, depths=asked.depths, shares=None if asked.like is None else _shares(asked.like),
    )  # fmt: skip
    return [{"shape": decoder.name, **row} for row in found]


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
    maps = load_maps(run.path / MAPS_FILE, job.plan.replaced)
    model = run.manifest["model"]
    engine = job.engine.capabilities
    costs = cost.cost_model(options, engine, job.spec, run.path / "original", token_table=job.has_token_table)
    return _Decoder(model.get("title") or model["name"], options.precision, costs, cost.map_sizes(maps))


def _sizes(asked: Request, decoder: _Decoder) -> dict[int, int]:
    if asked.layers is None and decoder.sizes:
        return decoder.sizes
    if asked.layers is None:
        raise UsageError("the replaced layers are unknown; name them, for example --layers 24-31")
    spec = decoder.costs.spec
    replaced = parse_layers(asked.layers, spec.num_layers)
    if isinstance(replaced, int):
        raise UsageError(f"--layers {asked.layers} is a count; name the layers, for example 24-31")
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
        limits = run.read_json(BENCH_FILE).get("limits")
    if not limits:
        raise NblError(f"{directory} has no measured efficiency on its machine; run nbl-export bench {directory}")
    shares = roofline.efficiencies([row for limit in limits for row in limit["rows"]])
    missing = {"prefill", "decode"} - shares.keys()
    if missing:
        raise NblError(f"the benchmark of {directory} has no {' and no '.join(sorted(missing))}; measure both")
    return shares
