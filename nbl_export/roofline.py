"""Measured speed as a share of what the machine allows; what other shapes would reach on other machines.

    time >= max(additions and multiplications / fastest matrix product, bytes / fastest reading of memory)

(roofline model: Williams, Waterman, Patterson 2009.) Arithmetic and bytes come from `cost`, the machine's two rates
from measurement (`measure_machine`) or, for a projection, from whoever asks. A small model whose weights stay in the
processor's cache between two tokens can come out above 100% of what memory allows.

`expect` says how well the model explains a sweep: with one efficiency for prefill and one for decode, the medians of
what was measured, how far is each point from limit x efficiency.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbl_export.cost import CostModel, Work, weight_bytes
from nbl_export.errors import NblError
from nbl_export.records import DecoderSpec, Scenario, Timing

__all__ = ["SHAPES", "MachineRates", "efficiencies", "expect", "limit_seconds", "measure_machine", "project", "rows",
           "shape_costs"]  # fmt: skip

# Kernels that a graph of a precision may use on the CPU; the fastest one is its limit.
_KERNELS = {"int8": ("int8", "int4", "fp32"), "int4": ("int8", "int4", "fp32")}
_FLOAT = ("fp32",)
_PHASES = {"pp": "prefill", "tg": "decode"}

# Decoder and width of its MLP, from the models' config.json
SHAPES: dict[str, tuple[DecoderSpec, int]] = {
    "Llama-3.1-8B": (DecoderSpec("llama", 32, 4096, 32, 8, 128, 128_256, 131_072), 14_336),
    "Mistral-7B-v0.3": (DecoderSpec("mistral", 32, 4096, 32, 8, 128, 32_768, 32_768), 14_336),
}


@dataclass(frozen=True)
class MachineRates:
    """What a machine can do. gemm_flops_per_second: of each kernel; "given" where the figure is not measured."""

    gemm_flops_per_second: Mapping[str, float]
    read_bytes_per_second: float
    threads: int | None = None

    @classmethod
    def given(cls, flops_per_second: float, read_bytes_per_second: float) -> MachineRates:
        """Of a machine that is not here: arithmetic at the precision in question, and memory bandwidth."""
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


def measure_machine(threads: int) -> MachineRates:
    """Measure this machine with so many threads: some seconds and 0.6 GB of memory. Only a quiet machine tells.

    Raises:
        NblError: ONNX Runtime is not installed.
    """
    from nbl_export.engines import rates

    try:
        products = rates.gemm_flops_per_second(threads)
    except ImportError as error:
        raise NblError(
            f"measuring the machine needs onnxruntime and onnx ({error}): install nbl-export[cpu]"
        ) from error
    return MachineRates(products, rates.read_bytes_per_second(threads), threads)


def limit_seconds(work: Work, machine: MachineRates, precision: str) -> tuple[float, str]:
    """The least time that this work takes, and what bounds it: "arithmetic" or "memory"."""
    arithmetic = work.flops / machine.flops_per_second(precision)
    memory = work.bytes / machine.read_bytes_per_second
    return (arithmetic, "arithmetic") if arithmetic >= memory else (memory, "memory")


def rows(
    bench: Mapping[str, Any], costs: CostModel, sizes: Mapping[int, int], machine: MachineRates, precision: str
) -> list[dict[str, Any]]:
    """One row for each test and variant of bench.json, in its order.

    Args:
        bench: timings of bench.json, of one sequence each and one number of threads; variant "original" has no map,
            every other one those of `sizes`.
        costs: of what the run ships (`reach.cost_model`). sizes: of its maps (`cost.map_sizes`).
        machine: measured with the threads that bench used.
        precision: of the graphs.

    Returns:
        rows with test, kind, tokens, depth, variant, flops and bytes (of the whole test), bound,
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
    """A prefill is one piece of work, decode one for each token."""
    if scenario.kind == "pp":
        return [costs.prefill(sizes, scenario.tokens, scenario.depth)]
    return [costs.decode(sizes, scenario.depth + i) for i in range(scenario.tokens)]


def efficiencies(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median share of the limit, 0 to 1 and seldom more, of each phase among `rows`."""
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
    """The cost model of a name in `SHAPES`, with caches of two bytes an element."""
    spec, intermediate = SHAPES[shape]
    size = weight_bytes(precision)
    return CostModel(spec, intermediate, size, size, 2)


def project(
    name: str,
    costs: CostModel,
    sizes: Mapping[int, int],
    machine: MachineRates,
    precision: str,
    *,
    tokens: int = 512,
    depths: Sequence[int] = (0, 2048),
    shares: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """What the original and the NBL decoder can reach on another machine: a projection, not a measurement.

    Args:
        name: of the decoder. costs: `shape_costs`, or `reach.cost_model` of a run. sizes: of its maps.
        machine: mostly `MachineRates.given`. precision: of the weights, by which the machine's rate goes.
        tokens: of each prefill; decode is at the given depths.
        shares: efficiency of each phase, measured elsewhere (`efficiencies`); None gives the limits alone.

    Returns:
        rows marked "projection": true, with shape, phase, tokens, depth, bound, the limits in tokens per second of
        both, the ratio, and with `shares` what is expected of both.
    """
    found = []
    for kind, count, depth in (*(("pp", tokens, d) for d in depths), *(("tg", 1, d) for d in depths)):
        work = {n: _work(costs, m, Scenario(kind, count, depth))[0] for n, m in (("original", {}), ("nbl", sizes))}
        limits = {n: limit_seconds(w, machine, precision) for n, w in work.items()}
        speeds = {n: count / seconds for n, (seconds, _) in limits.items()}
        row = {
            "projection": True, "shape": name, "precision": precision, "replaced_layers": sorted(sizes),
            "phase": _PHASES[kind], "tokens": count, "depth": depth, "bound": limits["nbl"][1],
            "limit_tokens_per_second": speeds, "ratio": speeds["nbl"] / speeds["original"],
        }  # fmt: skip
        if shares is not None:
            row["expected_tokens_per_second"] = {n: s * shares[_PHASES[kind]] for n, s in speeds.items()}
        found.append(row)
    return found
