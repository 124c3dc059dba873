"""Measured speed as a share of the machine's limit.

    time >= max(additions and multiplications / fastest matrix product, bytes / fastest reading of memory)

Source: the roofline model (Williams, Waterman, Patterson 2009). Arithmetic and bytes come from `measure.cost`. The
machine's two rates are measured (`measure_machine`). A small model can exceed 100% of the memory limit, if its
weights stay in the processor's cache between two tokens.

`expect` tells how well the model explains a sweep. The efficiencies of prefill and of decode are the medians of the
measured shares. The error of a point is its distance from limit x efficiency.

The machine's rates are the best of a few repetitions:

    fp32     MatMul, float32
    int8     MatMulInteger, uint8 by int8, which is faster on a CPU with dot-product instructions
    int4     MatMulNBits, blocks of 32, accuracy level 4, as in int4 graphs

Products run on ONNX Runtime's CPU provider with the requested threads: 512 rows by a 2048 x 2048 matrix. As many
threads read memory, each its own part of an array that no cache can hold.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.errors import NblError
from nbl_export.graph.session import open_session
from nbl_export.measure.cost import CostModel, Work
from nbl_export.mixers.base import TokenWork
from nbl_export.model.memory import available_bytes
from nbl_export.records.results import Scenario, Timing

__all__ = ["MachineRates", "best_seconds", "efficiencies", "expect", "limit_seconds", "limits_of", "measure_machine",
           "rows"]  # fmt: skip

# Kernels that a graph of a precision may use on the CPU; the fastest kernel is the limit.
_KERNELS = dict.fromkeys(("int8", "int4"), ("int8", "int4", "fp32"))
_FLOAT = ("fp32",)
_PHASES = {"pp": "prefill", "tg": "decode"}
_BYTES = 2 << 30  # required free memory; the measurement of the machine takes 0.6 GB
_ROWS, _WIDTH, _BLOCK = 512, 2048, 32
_ARRAY_BYTES = 512 << 20
_REPETITIONS = 7


@dataclass(frozen=True)
class MachineRates:
    """Measured rates of a machine. gemm_flops_per_second: by kernel."""

    gemm_flops_per_second: Mapping[str, float]
    read_bytes_per_second: float
    threads: int | None = None

    def flops_per_second(self, precision: str) -> float:
        """Rate of the fastest kernel that a graph of this precision may use."""
        return max(self.gemm_flops_per_second[name] for name in _KERNELS.get(precision, _FLOAT))


def limit_seconds(work: Work, machine: MachineRates, precision: str) -> tuple[float, str]:
    """The least time of this work in seconds, and its bound: "arithmetic" or "memory"."""
    arithmetic = work.flops / machine.flops_per_second(precision)
    memory = work.bytes / machine.read_bytes_per_second
    return (arithmetic, "arithmetic") if arithmetic >= memory else (memory, "memory")


def rows(
    timings: Sequence[Mapping[str, Any]], costs: CostModel, sizes: Mapping[int, TokenWork], machine: MachineRates,
    precision: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for each test and variant of bench.json, in its order.

    Args:
        timings: of bench.json, of one sequence each and one number of threads. The variant "original" has no
            map; every other variant has the maps of `sizes`.
        costs: cost model of the deployed graphs (`measure.cost.cost_model`).
        sizes: of the run's maps (`measure.cost.map_sizes`).
        machine: measured with the threads that bench used.
        precision: of the graphs.

    Returns:
        Rows with the facts of the scenario, variant, flops and bytes (of the whole test), bound,
        tokens_per_second (the median), limit_tokens_per_second and percent (of the limit).
    """
    found = []
    for t in timings:
        timing = Timing.from_json(t)
        replaced = {} if timing.variant == "original" else sizes
        work = _work(costs, replaced, timing.scenario)
        seconds = [limit_seconds(w, machine, precision) for w in work]
        limit = timing.scenario.tokens / sum(s for s, _ in seconds)
        found.append({
            **timing.scenario.facts(), "variant": timing.variant,
            "flops": sum(w.flops for w in work), "bytes": sum(w.bytes for w in work), "bound": seconds[-1][1],
            "tokens_per_second": timing.median, "limit_tokens_per_second": limit,
            "percent": 100 * timing.median / limit,
        })  # fmt: skip
    return found


def _work(costs: CostModel, sizes: Mapping[int, TokenWork], scenario: Scenario) -> list[Work]:
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


# -- this machine ------------------------------------------------------------------------------------------------


def limits_of(
    bench: Mapping[str, Any], costs: Callable[[], CostModel], sizes: Mapping[int, TokenWork], precision: str
) -> dict[str, Any]:
    """Hardware limits to add to bench.json; empty if the decoder's costs are unknown, or memory is short.

    Args:
        costs: the cost model of the graphs; raises NblError if the width of the MLP is unknown.
        sizes: of the maps.
        precision: of the graphs.
    """
    if available_bytes() < _BYTES:  # the measurement would make a small machine swap
        return {}
    try:
        model = costs()
    except NblError:  # the checkpoint is gone, or the configuration of a graph does not state the MLP's width
        return {}
    found = []
    for threads in bench["threads"]:
        timings = [t for t in bench["timings"] if t["threads"] == threads and t["batch"] == 1]
        if timings:
            rates = _rates(threads)
            shares = expect(rows(timings, model, sizes, rates, precision))
            found.append({"rates": dataclasses.asdict(rates), "rows": shares})
    return {"limits": found} if found else {}


def measure_machine(threads: int) -> MachineRates:
    """Measure this machine's rates with a number of threads, in seconds and 0.6 GB of memory.

    Other programs that run at the same time make the rates too low.

    Raises:
        NblError: ONNX Runtime is not installed.
    """

    try:
        products = gemm_flops_per_second(threads)
    except ImportError as error:
        raise NblError(
            f"measuring the machine needs onnxruntime and onnx ({error}): install nbl-export[cpu]"
        ) from error
    return MachineRates(products, read_bytes_per_second(threads), threads)


_rates = functools.cache(measure_machine)  # each process measures the machine once


def gemm_flops_per_second(threads: int) -> dict[str, float]:
    """Additions and multiplications a second of each kernel above; takes a second or two."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((_WIDTH, _WIDTH)).astype(np.float32)
    codes = rng.integers(0, 256, (_WIDTH, _WIDTH // _BLOCK, _BLOCK // 2), dtype=np.uint8)
    scales = rng.random(_WIDTH * _WIDTH // _BLOCK, dtype=np.float32)
    packed: dict[str, Any] = {"K": _WIDTH, "N": _WIDTH, "bits": 4, "block_size": _BLOCK, "accuracy_level": 4}
    small = rng.integers(-100, 100, (_WIDTH, _WIDTH)).astype(np.int8)
    x = rng.standard_normal((_ROWS, _WIDTH)).astype(np.float32)
    x8 = rng.integers(0, 200, (_ROWS, _WIDTH)).astype(np.uint8)
    runs = {
        "fp32": _run("MatMul", x, [weight], threads),
        "int8": _run("MatMulInteger", x8, [small], threads),
        "int4": _run("MatMulNBits", x, [codes, scales], threads, domain="com.microsoft", **packed),
    }
    return {name: 2.0 * _ROWS * _WIDTH * _WIDTH / best_seconds(run) for name, run in runs.items()}


def read_bytes_per_second(threads: int) -> float:
    """Bytes a second that `threads` threads read from memory together."""
    array = np.ones(_ARRAY_BYTES // 8, np.int64)
    parts = np.array_split(array, threads)

    def read() -> None:
        workers = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return array.nbytes / best_seconds(read)


def best_seconds(run: Callable[[], Any], repetitions: int = _REPETITIONS) -> float:
    """The shortest of some runs, after one that is not counted."""
    run()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _run(
    op: str, x: np.ndarray, constants: list[np.ndarray], threads: int, domain: str = "", **attributes: Any
) -> Callable[[], Any]:
    """A function that runs one node on x."""
    from onnx import TensorProto, helper, numpy_helper

    names = [f"c{i}" for i in range(len(constants))]
    node = helper.make_node(op, ["x", *names], ["y"], domain=domain, **attributes)
    weights = [numpy_helper.from_array(c, name) for c, name in zip(constants, names, strict=True)]
    taken = helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
    kind = TensorProto.INT32 if op == "MatMulInteger" else TensorProto.FLOAT
    given = helper.make_tensor_value_info("y", kind, [_ROWS, _WIDTH])
    graph = helper.make_graph([node], op, [taken], [given], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = open_session(model.SerializeToString(), threads)
    return lambda: session.run(None, {"x": x})
