"""`accept` for a provider of a GPU, on a stand-in: the CPU provider runs the directory, with planted faults."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.acceptance.child import Task, judged
from nbl_export.acceptance.steps.genai import GenaiParts
from nbl_export.acceptance.verdict import Emit, Outcome
from nbl_export.errors import AcceptanceError
from nbl_export.run.acceptance import accept as accepting
from nbl_export.run.progress import Ui
from nbl_export.targets import load_engine
from nbl_export.targets.base import Availability

from ..command import nbl


class Timed:
    """A runner on simulated seconds, with one fault."""

    def __init__(self, runner: Any, parts: StandInProvider) -> None:
        self.runner, self.parts, self.tokens = runner, parts, 0

    def __enter__(self) -> Timed:
        self.runner.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.runner.__exit__(*exc)

    def begin(self, max_tokens: int) -> None:
        self.runner.begin(max_tokens)

    def append(self, ids: Sequence[int]) -> None:
        self.tokens = len(ids)
        self.parts.seconds[0] += 1e-5 if self.parts.fault == "early clock" else 1e-3
        self.runner.append(ids)

    def rewind(self, length: int) -> None:
        self.runner.rewind(length)

    def last_logits(self) -> np.ndarray:
        logits: np.ndarray = self.runner.last_logits()
        if self.parts.fault == "other graph":
            logits = logits[::-1]
        if self.parts.fault == "chunks" and self.tokens > 40:
            logits = logits[::-1]
        return logits * np.float32("nan") if self.parts.fault == "nan" else logits

    def pick(self) -> int:
        self.parts.seconds[0] += 1e-3 if self.parts.fault == "early clock" else 1e-5
        return int(self.runner.pick())

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        found: list[int] = self.runner.greedy(ids, new_tokens)
        waits = os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"
        return found if waits or self.parts.fault != "race" else found[::-1]


@dataclasses.dataclass(frozen=True)
class StandInProvider(GenaiParts):
    fault: str = ""
    seconds: list[float] = dataclasses.field(default_factory=lambda: [0.0])

    def available(self) -> Availability:
        return Availability(self.fault != "no GPU", "a stand-in" if self.fault != "no GPU" else "no GPU is here")

    def runner(self, directory: Path) -> Any:
        return Timed(load_engine("ort", self.provider).open_checked(directory), self)

    def clock(self) -> float:
        return self.seconds[0]


@pytest.fixture(scope="session")
def made(same: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for the CUDA provider. Never write to it."""
    output = tmp_path_factory.mktemp("accept-cuda") / "run"
    done = nbl(*same, "--provider", "cuda", "--output", output)
    assert done.status == 0, done.err
    return output


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def accepted(run: Path, fault: str = "") -> dict[str, Any]:
    def here(task: Task, heard: Emit) -> Outcome:
        return Outcome("passed") if task.work.func is accepting.bench else judged(task, heard)  # type: ignore[attr-defined]

    return accepting.accept(run, Ui(quiet=True), run_step=here, parts=StandInProvider("cuda", fault))


def test_every_step_passes(run: Path) -> None:
    found = accepted(run)
    assert [(step["step"], step["verdict"]) for step in found["steps"]] == [
        (name, "passed") for name in ("machine", "plain", "prefill", "launches", "clock", "bench")
    ]
    assert found["engine"] == "ort --provider cuda"
    assert json.loads((run / "acceptance.json").read_text(encoding="utf-8")) == found


FAULTS = {
    "other graph": ("plain", "logits after the first chunk: the relative difference is", "ONNX Runtime GenAI"),
    "nan": ("plain", "logits are not finite after", "ONNX Runtime GenAI"),
    "chunks": ("prefill", "a chunk of 48 tokens against single steps", "ONNX Runtime GenAI"),
    "race": ("launches", "a kernel reads what another still writes", "ONNX Runtime GenAI"),
    "early clock": ("clock", "picking a token takes", "the timing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_told_by_its_step(fault: str, run: Path) -> None:
    found = accepted(run, fault)
    name, said, layer = FAULTS[fault]
    told = [step["step"] for step in found["steps"] if step["verdict"] == "failed"]
    assert told[0] == name, found["steps"]
    with pytest.raises(AcceptanceError, match=f"step {name} failed: .*{said}.* At fault: {layer}"):
        accepting.refuse_failed(found, run)
    assert found["steps"][-1]["verdict"] == "not reached"


def test_a_machine_without_the_provider_cannot_run(run: Path) -> None:
    found = accepted(run, "no GPU")
    assert found["status"] == "cannot run"
    assert "no GPU is here" in found["steps"][0]["said"]


def test_the_benchmark_is_the_last_step(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its figures are in the record; it runs in a process that may start processes."""
    from nbl_export.run import pipeline

    asked: list[Any] = []

    class Done:
        def read_json(self, _name: str) -> Any:
            return {"rows": [{"test": "tg128", "depth": 0, "variant": "nbl", "tokens_per_second_median": 123.0}]}

    def run_stages(*given: Any, **how: Any) -> Any:
        asked.append((given[:2], how))
        return Done()

    monkeypatch.setattr(pipeline, "run_stages", run_stages)
    seen: list[Any] = []
    work = functools.partial(accepting.bench, type("Target", (), {"directory": run}))
    outcome = judged(Task(work, "", ""), lambda kind, value: seen.append(value) if kind == "saw" else None)
    assert outcome == Outcome("passed")
    assert seen == [{"name": "tg128, nbl, tokens/s", "value": 123.0, "limit": None}]
    assert asked == [((run, "report"), {"force": True, "needs": "bench"})]
    assert accepting.BENCH.last
