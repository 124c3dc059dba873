"""A target added by one package and one row: a whole job from calibration to text, and a planted fault."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nbl_export import targets
from tests.command import nbl

from .toy import engine as toy

pytestmark = pytest.mark.job


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toy is a target for one test."""
    monkeypatch.setitem(targets.ENGINES, "toy", "tests.targets.toy.engine:TOY")
    yield
    targets.load_engine.cache_clear()


def test_a_job_of_a_new_target(
    registered: None, same: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    words = (*same, "--engine", "toy", "--output", run)
    done = nbl(*words)
    assert done.status == 0, done.err
    found = json.loads((run / "verify.json").read_text(encoding="utf-8"))
    assert (found["passed"], found["status"]) == (True, "verified")
    assert {c["check"] for c in found["checks"]} == {"structure", "exporter", "original", "nbl", "text"}
    bench = json.loads((run / "bench.json").read_text(encoding="utf-8"))
    assert {row["variant"] for row in bench["timings"]} == {"original", "nbl"}
    assert "toy" in (run / "report.md").read_text(encoding="utf-8")
    said = nbl("generate", run, "def main", "--max-new-tokens", "4")
    assert said.status == 0 and said.out.strip()

    def transposed(model: Any, checkpoint: Path, maps: Mapping[int, Any], tap: str, out: Path) -> None:
        wrong = {i: dataclasses.replace(m, weight=m.weight.T) for i, m in maps.items()}
        save(model, checkpoint, wrong, tap, out)

    save = toy.save_linearized
    monkeypatch.setattr(toy, "save_linearized", transposed)
    shutil.rmtree(run / "model")
    assert nbl(*words).status == 3
    failed = json.loads((run / "verify.json").read_text(encoding="utf-8"))["checks"]
    assert {c["check"] for c in failed if not c["passed"]} >= {"structure"}
