"""Costs against what ONNX Runtime really runs; percent of the limit and expectation by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from nbl_export.errors import NblError
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.names import all_logits_file
from nbl_export.measure import roofline
from nbl_export.measure.cost import CostModel, Work, read_mlp, weight_bytes
from nbl_export.measure.roofline import (
    MachineRates,
    efficiencies,
    expect,
    limit_seconds,
    limits_of,
    measure_machine,
    rows,
)
from nbl_export.mixers.base import TokenWork
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.mlp import MlpSpec
from nbl_export.targets import all_targets

from ..tiny import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB

RESULTS = Path(__file__).parents[2] / "bench" / "results"
SPEC = DecoderSpec("llama", LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, 512)
MACHINE = MachineRates({"fp32": 1e12, "int8": 3e12, "int4": 2e12}, 1e10, 2)


# -- what a graph does, counted node by node --------------------------------------------------------------


class Count:
    """Runs a graph with profiling on and adds up the work of the nodes that ran."""

    def __init__(self, directory: Path, file: str, scratch: Path) -> None:
        self.graph = onnx.load(str(directory / file), load_external_data=False).graph
        self.decoder = OnnxDecoder(directory, HEAD_DIM, file=file)
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(scratch / "profile")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.decoder.session = onnxruntime.InferenceSession(str(directory / file), options)

    def run(self, tokens: int, depth: int) -> Work:
        """Work of a chunk of tokens after so many."""
        self.decoder.begin(1)
        for chunk in [depth] if depth else []:
            self.decoder.step(np.full((1, chunk), 5))
        self.decoder.step(np.full((1, tokens), 5))
        events = json.loads(Path(self.decoder.session.end_profiling()).read_text(encoding="utf-8"))
        last = max(e["ts"] for e in events if e.get("name") == "model_run")
        ran = [e["args"] for e in events if e.get("cat") == "Node" and "op_name" in e["args"] and e["ts"] >= last]
        flops = sum(self._flops(args, tokens, depth) for args in ran)
        return Work(flops, self._weight_bytes() + self.decoder.cache_bytes)

    def _flops(self, args: dict[str, Any], tokens: int, depth: int) -> float:
        shapes = [next(iter(entry.values())) for entry in args["input_type_shape"]]
        given = [next(iter(entry.values())) for entry in args["output_type_shape"]]
        if args["op_name"] == "MatMul":
            return 2.0 * math.prod(given[0]) * shapes[0][-1]
        if args["op_name"] == "MatMulNBits":
            return 2.0 * math.prod(given[0]) * shapes[0][-1]
        if args["op_name"] == "GroupQueryAttention":
            assert given[0] == [1, tokens, SPEC.num_heads * HEAD_DIM]
            pairs = sum(depth + i + 1 for i in range(tokens))
            return 4.0 * SPEC.num_heads * HEAD_DIM * pairs
        return 0.0

    def _weight_bytes(self) -> int:
        sizes = {t.name: math.prod(t.dims) * {1: 4, 2: 1}[t.data_type]
                 for t in self.graph.initializer if t.data_type in (1, 2)}  # fmt: skip
        made = {name: node for node in self.graph.node for name in node.output}
        total = 0
        for node in self.graph.node:
            if node.op_type in ("MatMul", "MatMulNBits"):
                names = [
                    made[n].input[0] if n in made and made[n].op_type == "Transpose" else n for n in node.input[1:]
                ]
                total += sum(sizes.get(n, 0) for n in names)
        return total


def costs_of(checkpoint: Path, precision: str, *, pruned: bool) -> CostModel:
    size = weight_bytes(precision)
    return CostModel(
        SPEC, read_mlp(checkpoint), size, size, 4, all_logits=not pruned, tail_pruned=pruned
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize(("tokens", "depth"), [(9, 0), (7, 13), (1, 20)])
def test_original_graph(
    exported: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path, precision: str, tokens: int,
    depth: int,
) -> None:  # fmt: skip
    directory = exported("llama", "genai", precision)
    found = Count(directory, "model.onnx", tmp_path).run(tokens, depth)
    assert costs_of(checkpoint("llama"), precision, pruned=False).prefill({}, tokens, depth) == found


@pytest.mark.parametrize(("tokens", "depth"), [(9, 0), (7, 13), (1, 20)])
@pytest.mark.parametrize("name", ["original", "model"])
def test_graphs_that_a_run_ships(
    finished: Path, checkpoint: Callable[[str], Path], tmp_path: Path, name: str, tokens: int, depth: int
) -> None:
    """Pruned tails, replaced layers with full maps."""
    replaced = json.loads((finished / "nbl.json").read_text(encoding="utf-8"))["replaced_layers"]
    sizes = dict.fromkeys(replaced, TokenWork(HIDDEN * HIDDEN, HIDDEN * HIDDEN)) if name == "model" else {}
    for file, pruned in (("model.onnx", True), (all_logits_file(finished / name), False)):
        found = Count(finished / name, file, tmp_path).run(tokens, depth)
        assert costs_of(checkpoint("llama"), "fp32", pruned=pruned).prefill(sizes, tokens, depth) == found


# -- shares of the limit ------------------------------------------------------------------------------------


def timing(kind: str, tokens: int, depth: int, variant: str, seconds: float) -> dict[str, Any]:
    return {"kind": kind, "tokens": tokens, "depth": depth, "variant": variant, "samples_ns": [seconds * 1e9] * 3}


def test_rows_by_hand() -> None:
    costs = CostModel(SPEC, MlpSpec(96), 4.0, 4.0, 4)
    whole = costs.prefill({}, 100).flops / 1e11
    step = sum(costs.decode({1: TokenWork(4096, 4096)}, 10 + i).bytes for i in range(4)) / 1e10
    found = rows(
        [timing("pp", 100, 0, "original", 2 * whole), timing("tg", 4, 10, "nbl", 5 * step)],
        costs, {1: TokenWork(4096, 4096)}, MachineRates({"fp32": 1e11}, 1e10), "fp32",
    )  # fmt: skip
    assert [r["percent"] for r in found] == pytest.approx([50, 20])
    assert [r["bound"] for r in found] == ["arithmetic", "memory"]
    assert found[0]["limit_tokens_per_second"] == pytest.approx(100 / whole)
    assert found[1]["tokens_per_second"] == pytest.approx(4 / (5 * step))
    assert (found[1]["test"], found[1]["depth"], found[1]["variant"]) == ("tg4", 10, "nbl")


def test_bound_is_the_slower_of_the_two() -> None:
    assert limit_seconds(Work(2e12, 1e9), MACHINE, "fp32") == (2.0, "arithmetic")
    assert limit_seconds(Work(2e12, 4e10), MACHINE, "fp32") == (4.0, "memory")
    assert limit_seconds(Work(3e12, 1e9), MACHINE, "int4") == (1.0, "arithmetic")  # its fastest kernel


def test_expectation() -> None:
    found = [
        {"kind": "pp", "percent": p, "limit_tokens_per_second": 100.0, "tokens_per_second": p} for p in (40, 50, 60)
    ] + [{"kind": "tg", "percent": 80, "limit_tokens_per_second": 10.0, "tokens_per_second": 8.0}]
    assert efficiencies(found) == {"prefill": 0.5, "decode": 0.8}
    assert [r["error"] for r in expect(found)] == pytest.approx([-0.2, 0.0, 0.2, 0.0])
    assert expect(found)[3]["expected_tokens_per_second"] == 8.0


# -- limits in bench.json -----------------------------------------------------------------------------------


def bench_of(*threads: int) -> dict[str, Any]:
    """Timings of one and of two sequences with each number of threads."""
    timings = [{**timing("pp", 8, 0, name, 0.1), "threads": n, "batch": batch}
               for n in threads for batch in (1, 2) for name in ("original", "nbl")]  # fmt: skip
    return {"threads": list(threads), "timings": timings}


def costs() -> CostModel:
    return CostModel(SPEC, MlpSpec(96), 4.0, 4.0, 4)


def test_one_entry_for_each_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch has no row."""
    monkeypatch.setattr(roofline, "_rates", lambda n: MachineRates({"fp32": n * 1e9}, 1e9, n))
    found = limits_of(bench_of(1, 2), costs, {1: TokenWork(4096, 4096)}, "fp32")["limits"]
    assert [entry["rates"] for entry in found] == [
        {"gemm_flops_per_second": {"fp32": n * 1e9}, "read_bytes_per_second": 1e9, "threads": n} for n in (1, 2)
    ]
    for n, entry in zip((1, 2), found, strict=True):
        assert [(r["variant"], r["threads"], r["batch"]) for r in entry["rows"]] == [("original", n, 1), ("nbl", n, 1)]


def test_nothing_where_memory_is_short_or_costs_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> CostModel:
        raise NblError("no width of the MLP")

    monkeypatch.setattr(roofline, "_rates", lambda n: MACHINE)
    assert limits_of(bench_of(1), unknown, {}, "fp32") == {}
    monkeypatch.setattr(roofline, "available_bytes", lambda: 1 << 30)
    assert limits_of(bench_of(1), costs, {}, "fp32") == {}


def test_a_machine_is_measured_for_onnx_runtime_on_a_cpu_alone() -> None:
    assert [t.capabilities.title for t in all_targets() if t.capabilities.measures_limits] == ["ONNX Runtime"]


def test_every_test_and_variant_of_a_run(finished: Path) -> None:
    bench = json.loads((finished / "bench.json").read_text(encoding="utf-8"))
    (found,) = bench["limits"]
    assert [found["rates"]["threads"]] == bench["threads"]
    keys = [(t["test"], t["depth"], t["variant"]) for t in bench["timings"]]
    assert [(r["test"], r["depth"], r["variant"]) for r in found["rows"]] == keys
    assert min(r[name] for r in found["rows"] for name in ("tokens_per_second", "limit_tokens_per_second")) > 0
    by_variant = {r["variant"]: r["flops"] for r in found["rows"] if r["kind"] == "tg"}
    assert by_variant["nbl"] < by_variant["original"]
    page = (finished / "report.md").read_text(encoding="utf-8")
    table = page.partition("### Share of what the machine allows")[2].partition("###")[0]
    assert table.count("| arithmetic |") + table.count("| memory |") == len(keys)


# -- the machine ----------------------------------------------------------------------------------------------


def test_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are those of the best repetition, by a clock that says how long each took."""
    monkeypatch.setattr(roofline, "best_seconds", lambda run: (run(), 0.5)[1])
    monkeypatch.setattr(roofline, "_WIDTH", 320)
    monkeypatch.setattr(roofline, "_ARRAY_BYTES", 1 << 19)
    found = measure_machine(1)
    assert found.gemm_flops_per_second == dict.fromkeys(("fp32", "int8", "int4"), 4.0 * 512 * 320 * 320)
    assert (found.read_bytes_per_second, found.threads) == (2.0 * (1 << 19), 1)


def test_best_of_the_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 5.0, 5.0, 7.0, 7.0, 10.0])
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: next(ticks))
    assert roofline.best_seconds(lambda: None, 3) == 2.0


def test_without_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(threads: int) -> dict[str, float]:
        raise ImportError("No module named 'onnxruntime'")

    monkeypatch.setattr(roofline, "gemm_flops_per_second", fail)
    with pytest.raises(NblError, match=r"install nbl-export\[cpu\]"):
        measure_machine(1)


# -- against a measurement ------------------------------------------------------------------------------------


def test_explains_every_point_of_the_measured_sweep_of_smollm2() -> None:
    """fp32, 8 of 30 layers, two cores, a committed run: one efficiency a phase, each point within 15%.

    Prefill is held closer, as the run's noise allows: without the pruned tail the model is off by 14% and more.
    """
    report = json.loads((RESULTS / "demo-smollm2-fp32.json").read_text(encoding="utf-8"))
    spec = DecoderSpec("llama", 30, 576, 9, 3, 64, 49152, 8192)
    sizes = dict.fromkeys(report["replaced_layers"], TokenWork(576 * 576, 576 * 576))
    timings = [
        {**row, "samples_ns": [row["tokens"] * 1e9 / speed for speed in row["samples"]]} for row in report["rows"]
    ]
    machine = MachineRates({"fp32": 2e11}, 4e10)  # only which of the two bounds a test matters here
    found = expect(rows(timings, CostModel(spec, MlpSpec(1536), 4.0, 4.0, 4), sizes, machine, "fp32"))
    assert len(found) == 8 and {(r["kind"], r["bound"]) for r in found} == {("pp", "arithmetic"), ("tg", "memory")}
    assert [r for r in found if abs(r["error"]) > 0.15] == []
    prefill = [r for r in found if r["kind"] == "pp"]
    assert max(abs(r["error"]) for r in prefill) < 0.06
