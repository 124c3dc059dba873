"""Measured speed as a share of the machine's limit, and projected speed of other shapes on other machines.

    time >= max(additions and multiplications / fastest matrix product, bytes / fastest reading of memory)

Source: the roofline model (Williams, Waterman, Patterson 2009). Arithmetic and bytes come from `cost.model`. The
machine's two rates are measured (`measure_machine`) or, for a projection, given by the caller. A small model can exceed
100% of the memory limit, if its weights stay in the processor's cache between two tokens.

`expect` tells how well the model explains a sweep. The efficiencies of prefill and of decode are the medians of the
measured shares. The error of a point is its distance from limit x efficiency.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbl_export.cost.model import CostModel, Work, weight_bytes
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.results import Scenario, Timing

__all__ = ["SHAPES", "MachineRates", "efficiencies", "expect", "limit_seconds", "project", "rows", "shape_costs"]

# Kernels that a graph of a precision may use on the CPU; the fastest kernel is the limit.
_KERNELS = dict.fromkeys(("int8", "int4", "gguf"), ("int8", "int4", "fp32"))


_FLOAT = ("fp32",)


_PHASES = {"pp": "prefill", "tg": "decode"}


# Decoder and MLP width, from the models' config.json
SHAPES: dict[str, tuple[DecoderSpec, int]] = {
    "Llama-3.1-8B": (DecoderSpec("llama", 32, 4096, 32, 8, 128, 128_256, 131_072), 14_336),
    "Mistral-7B-v0.3": (DecoderSpec("mistral", 32, 4096, 32, 8, 128, 32_768, 32_768), 14_336),
}


@dataclass(frozen=True)
class MachineRates:
    """Rates of a machine. gemm_flops_per_second: by kernel; by "given" if the figure is not measured."""

    gemm_flops_per_second: Mapping[str, float]
    read_bytes_per_second: float
    threads: int | None = None

    @classmethod
    def given(cls, flops_per_second: float, read_bytes_per_second: float) -> MachineRates:
        """Rates of another machine: arithmetic at the precision in question, and memory bandwidth."""
        return cls({"given": flops_per_second}, read_bytes_per_second)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MachineRates:
        return cls(dict(value["gemm_flops_per_second"]), value["read_bytes_per_second"], value["threads"])

    def to_json(self) -> dict[str, Any]:
        return {
            "gemm_flops_per_second": dict(self.gemm_flops_per_second),
            "read_bytes_per_second": self.read_bytes_per_second,
            "threads": self.threads,
        }

    def flops_per_second(self, precision: str) -> float:
        """Rate of the fastest kernel that a graph of this precision may use."""
        if "given" in self.gemm_flops_per_second:
            return self.gemm_flops_per_second["given"]
        return max(self.gemm_flops_per_second[name] for name in _KERNELS.get(precision, _FLOAT))


def limit_seconds(work: Work, machine: MachineRates, precision: str) -> tuple[float, str]:
    """The least time of this work in seconds, and its bound: "arithmetic" or "memory"."""
    arithmetic = work.flops / machine.flops_per_second(precision)
    memory = work.bytes / machine.read_bytes_per_second
    return (arithmetic, "arithmetic") if arithmetic >= memory else (memory, "memory")


def rows(
    bench: Mapping[str, Any], costs: CostModel, sizes: Mapping[int, int], machine: MachineRates, precision: str
) -> list[dict[str, Any]]:
    """One row for each test and variant of bench.json, in its order.

    Args:
        bench: timings of bench.json, of one sequence each and one number of threads. The variant "original" has no
            map; every other variant has the maps of `sizes`.
        costs: cost model of the deployed graphs (`model.cost_model`).
        sizes: of the run's maps (`cost.model.map_sizes`).
        machine: measured with the threads that bench used.
        precision: of the graphs.

    Returns:
        Rows with test, kind, tokens, depth, variant, flops and bytes (of the whole test), bound,
        tokens_per_second (the median), limit_tokens_per_second and percent (of the limit).
    """
    found = []
    for t in bench["timings"]:
        timing = Timing(Scenario(t["kind"], t["tokens"], t["depth"]), t["variant"], tuple(t["samples_ns"]))
        replaced = {} if timing.variant == "original" else sizes
        work = _work(costs, replaced, timing.scenario)
        seconds = [limit_seconds(w, machine, precision) for w in work]
        limit = timing.scenario.tokens / sum(s for s, _ in seconds)
        found.append({
            "test": timing.scenario.test, "kind": t["kind"], "tokens": t["tokens"], "depth": t["depth"],
            "variant": timing.variant,
            "flops": sum(w.flops for w in work), "bytes": sum(w.bytes for w in work), "bound": seconds[-1][1],
            "tokens_per_second": timing.median, "limit_tokens_per_second": limit,
            "percent": 100 * timing.median / limit,
        })  # fmt: skip
    return found


def _work(costs: CostModel, sizes: Mapping[int, int], scenario: Scenario) -> list[Work]:
    """One piece of work for a prefill; for decode one piece for each token."""
    if scenario.kind == "pp":
        return [costs.prefill(sizes, scenario.tokens, scenario.depth)]
    return [costs.decode(sizes, scenario.depth + i) for i in range(scenario.tokens)]


def efficiencies(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median share of the limit for each phase among `rows`: 0 to 1, seldom more."""
    phases: dict[str, list[float]] = {}
    for row in found:
        phases.setdefault(_PHASES[row["kind"]], []).append(row["percent"] / 100)
    return {phase: statistics.median(shares) for phase, shares in phases.items()}


def expect(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with expected_tokens_per_second (limit x the phase's efficiency) and error (measured / expected - 1)."""
    shares = efficiencies(found)
    expected = []
    for row in found:
        speed = row["limit_tokens_per_second"] * shares[_PHASES[row["kind"]]]
        error = row["tokens_per_second"] / speed - 1
        expected.append({**row, "expected_tokens_per_second": speed, "error": error})
    return expected


def shape_costs(shape: str, precision: str) -> CostModel:
    """The cost model of a shape in `SHAPES`, with caches of two bytes an element."""
    spec, intermediate = SHAPES[shape]
    size = weight_bytes(precision)
    return CostModel(spec, intermediate, size, size, 2)


def project(
    costs: CostModel,
    sizes: Mapping[int, int],
    machine: MachineRates,
    precision: str,
    *,
    tokens: int = 512,
    depths: Sequence[int] = (0, 2048),
    shares: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Speed that the original and the NBL decoder can reach on another machine: a projection, not a measurement.

    Args:
        costs: `shape_costs`, or the cost model of a run.
        sizes: of the maps.
        machine: mostly `MachineRates.given`.
        precision: of the weights; selects the machine's rate.
        tokens: of each prefill; decode is at the given depths.
        shares: efficiency of each phase, measured elsewhere (`efficiencies`); None gives only the limits.

    Returns:
        Rows marked "projection": true, with phase, tokens, depth, bound, the limits of both decoders in tokens per
        second, their ratio, and with `shares` the expected speeds.
    """
    found = []
    for kind, count, depth in (*(("pp", tokens, d) for d in depths), *(("tg", 1, d) for d in depths)):
        work = {n: _work(costs, m, Scenario(kind, count, depth))[0] for n, m in (("original", {}), ("nbl", sizes))}
        limits = {n: limit_seconds(w, machine, precision) for n, w in work.items()}
        speeds = {n: count / seconds for n, (seconds, _) in limits.items()}
        row = {
            "projection": True, "precision": precision, "replaced_layers": sorted(sizes),
            "phase": _PHASES[kind], "tokens": count, "depth": depth, "bound": limits["nbl"][1],
            "limit_tokens_per_second": speeds, "ratio": speeds["nbl"] / speeds["original"],
        }  # fmt: skip
        if shares is not None:
            row["expected_tokens_per_second"] = {n: s * shares[_PHASES[kind]] for n, s in speeds.items()}
        found.append(row)
    return found
