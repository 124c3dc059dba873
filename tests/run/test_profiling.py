"""Profiles: traces made up by hand, and the runner that makes real ones, against plain ONNX Runtime."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import NblError
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.report.console import profile_table
from nbl_export.run.profile import Run, read_trace, summarise

from ..command import assert_refused, nbl, snapshot
from ..tiny import HEAD_DIM, VOCAB


def event(name: str, start: int, duration: int, operator: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "ts": start, "dur": duration, "cat": "Node" if operator else "Session"}
    return found if operator is None else {**found, "args": {"op_name": operator}}


TRACE = [
    event("session_initialization", 0, 90),
    event("early_kernel_time", 50, 9, "MatMul"),  # folded into a constant while the model was loaded
    event("model_run", 100, 50),
    event("SequentialExecutor::Execute", 101, 48),
    event("b_kernel_time", 120, 5, "Add"),
    event("a_kernel_time", 110, 10, "MatMul"),
    event("a_fence_before", 108, 1, "MatMul"),
    event("model_run", 200, 100),
    event("c_kernel_time", 240, 20, "MatMul"),
    event("a_kernel_time", 210, 30, "MatMul"),
    event("b_kernel_time", 280, 15, "Add"),
]


def test_kernels_belong_to_the_run_they_ran_in() -> None:
    assert read_trace(TRACE) == [
        Run(50, (("a", "MatMul", 10), ("b", "Add", 5))),
        Run(100, (("a", "MatMul", 30), ("c", "MatMul", 20), ("b", "Add", 15))),
    ]


def test_a_trace_without_nodes_is_refused() -> None:
    with pytest.raises(NblError, match="no events of nodes"):
        read_trace([e for e in TRACE if e["cat"] == "Session"])


def test_a_summary_is_of_one_run() -> None:
    found = summarise(read_trace(TRACE))
    assert (found["runs"], found["run_ms"], found["kernels_ms"]) == (2, 0.075, 0.04)
    assert found["operators"] == [
        {"operator": "MatMul", "calls": 1.5, "ms": 0.03, "share": 0.75},
        {"operator": "Add", "calls": 1.0, "ms": 0.01, "share": 0.25},
    ]
    assert [(n["node"], n["ms"]) for n in found["nodes"]] == [("a", 0.02), ("b", 0.01), ("c", 0.01)]
    assert found["nodes"][0]["operator"] == "MatMul"


@pytest.mark.parametrize("shared", [True, False])
def test_the_profiled_decoder_computes_what_the_graph_computes(
    shared: bool, exported: Callable[..., Path], tmp_path: Path
) -> None:
    from nbl_export.targets.onnx.engine import ProfiledDecoder

    directory = exported("llama") if shared else _unshared(exported("llama"), tmp_path / "unshared")
    (tmp_path / "traces").mkdir()
    ids = np.random.default_rng(0).integers(3, VOCAB, (1, 9))
    plain = OnnxDecoder(directory, HEAD_DIM)
    profiled = ProfiledDecoder(directory, 1, 9, tmp_path / "traces")
    for _ in range(2):  # the second time the caches hold what is to be forgotten
        plain.begin(1)
        profiled.begin()
        for chunk in (ids[:, :6], ids[:, 6:7], ids[:, 7:8], ids[:, 8:]):
            np.testing.assert_allclose(profiled.run(chunk[0].tolist()), plain.step(chunk)[0, -1], rtol=1e-4, atol=1e-5)
    runs = read_trace(profiled.trace())
    assert len(runs) == 8
    assert sum(operator == "GroupQueryAttention" for _, operator, _ in runs[0].kernels) == 3


def _unshared(directory: Path, copy: Path) -> Path:
    """The same graph with caches that grow."""
    copy.mkdir()
    for path in directory.iterdir():
        shutil.copyfile(path, copy / path.name)
    config = json.loads((directory / "genai_config.json").read_text(encoding="utf-8"))
    assert config["search"]["past_present_share_buffer"] is True
    config["search"]["past_present_share_buffer"] = False
    (copy / "genai_config.json").unlink()
    (copy / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy


def test_both_decoders_of_a_run_are_profiled_and_nothing_is_written(run: Path, tmp_path: Path) -> None:
    before = snapshot(run)
    short = ("--prompt-tokens", 8, "--repetitions", 2)
    done = nbl("profile", run, *short, "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    calls = {
        name: {o["operator"]: o["calls"] for o in decoder["decode"]["operators"]}
        for name, decoder in found["decoders"].items()
    }
    assert (calls["original"]["GroupQueryAttention"], calls["nbl"]["GroupQueryAttention"]) == (3, 2)
    assert found["decoders"]["nbl"]["prefill"]["runs"] == 2
    assert snapshot(run) == before
    text = nbl("profile", run / "model", *short)
    assert text.status == 0, text.err
    assert all(word in text.out for word in ("Prefill of 8 tokens", "GroupQueryAttention", "Dearest nodes: model"))


def test_the_table_has_a_row_for_every_operator_of_either_decoder() -> None:
    from rich.console import Console

    one, two = summarise(read_trace(TRACE)), summarise([Run(10, (("x", "Gather", 8),))])
    decoders = {"original": {"prefill": one, "decode": one}, "nbl": {"prefill": two, "decode": two}}
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*profile_table({"prompt_tokens": 8, "decoders": decoders}))
    text = console.export_text()
    for operator in ("MatMul", "Add", "Gather"):
        assert operator in text
    assert "75.0%" in text and "100.0%" in text


def test_a_directory_for_a_gpu_is_refused(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished / "model", tmp_path / "gpu"))
    config = json.loads((copy / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["provider_options"] = [{"cuda": {}}]
    (copy / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert_refused(nbl("profile", copy), 1, copy, "--provider cuda", "on the CPU")


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        (("--against", "x"), 2, "--against"),
        (("--depth", "5"), 2, "--depth"),
        (("--threads", "1,2"), 2, "--threads"),
        (("--prompt-tokens", "600"), 1, "512"),
    ],
)
def test_what_a_profile_has_no_use_for_is_refused(
    arguments: tuple[str, ...], status: int, part: str, finished: Path
) -> None:
    assert_refused(nbl("profile", finished, *arguments), status, part)
