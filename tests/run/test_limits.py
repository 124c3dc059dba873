"""The share of what the machine allows, in bench.json and in the report of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nbl_export.cost.roofline import MachineRates
from nbl_export.options.options import JobOptions
from nbl_export.run.stages import bench as bench_stage

from ..command import nbl


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


def test_one_entry_for_each_number_of_threads(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch has no row."""
    monkeypatch.setattr(bench_stage, "_rates", lambda n: MachineRates({"fp32": n * 1e9}, 1e9, n))
    done = nbl("bench", run, "--threads", "1,2", "--batch", "1,2")
    assert done.status == 0, done.err
    bench = json.loads((run / "bench.json").read_text(encoding="utf-8"))
    assert [entry["rates"]["threads"] for entry in bench["limits"]] == [1, 2]
    for entry in bench["limits"]:
        of_one = [t for t in bench["timings"] if t["threads"] == entry["rates"]["threads"] and t["batch"] == 1]
        assert len(entry["rows"]) == len(of_one) > 0


@pytest.mark.parametrize("options", [JobOptions("m", provider="cuda")])
def test_nothing_of_a_machine_that_is_not_measured(options: JobOptions) -> None:
    class Job:
        class engine:
            class capabilities:
                static = False
                graphs = "onnx"

    job: Any = Job()
    job.options = options
    assert bench_stage.limits_of(job, {"threads": [1], "timings": []}) == {}


def test_nothing_where_memory_is_short(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_stage, "available_bytes", lambda: 1 << 30)
    done = nbl("bench", run, "--repetitions", "2")
    assert done.status == 0, done.err
    assert "limits" not in json.loads((run / "bench.json").read_text(encoding="utf-8"))
    assert "Share of what the machine allows" not in (run / "report.md").read_text(encoding="utf-8")
