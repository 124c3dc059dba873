"""Tap and --fit through the whole job: what is recorded, what ships, what runs again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nbl_export.methods import choose
from nbl_export.methods.distill.training import DistillSettings
from nbl_export.options.options import JobOptions
from tests.command import Outcome, configured, nbl
from tests.jobs import until

pytestmark = pytest.mark.job

Same = tuple[object, ...]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def run(same: Same, output: Path, *options: object, last: str = "verify") -> Outcome:
    with until(last):
        done = nbl(*same, "--layers", "1,2", *options, "--output", output)
    assert done.status == 0, done.err
    return done


@pytest.mark.parametrize("tap", ["residual", "normed"])
def test_distilled_maps_ship_and_are_no_worse(tap: str, same: Same, tmp_path: Path) -> None:
    run(same, tmp_path / "run", "--fit", "distilled", *configured(tap=tap, distill_steps=6))
    facts = read(tmp_path / "run" / "nbl.json")
    assert facts["status"] == "verified"  # the graph holds the distilled maps: verification compares with these
    assert (facts["tap"], facts["fit"]["kind"]) == (tap, "distilled")
    curve = read(tmp_path / "run" / "distill.json")
    assert len(curve["train_kl"]) == 6
    kl = [value for _, value in curve["held_kl"]]
    start, maps = (load_file(tmp_path / "run" / f"{n}.safetensors") for n in ("start", "maps"))
    assert start.keys() == maps.keys()
    moved = not np.array_equal(start["layers.1.weight"], maps["layers.1.weight"])
    assert moved == (min(kl) < kl[0])
    assert read(tmp_path / "run" / "model" / "nbl.json")["fit"] == facts["fit"]


def test_a_limit_on_quality_is_kept_by_trained_maps(
    same: Same, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run without a number of layers: more layers begin than stay, and a changed training begins with all again."""
    output = tmp_path / "run"

    def made(steps: int) -> tuple[Any, str]:
        with until("rewrite"):
            limit = ("--max-perplexity-increase", "100000%", "--fit", "distilled")
            done = nbl(*same, *limit, *configured(distill_steps=steps), "--output", output)
        assert done.status == 0, done.err
        return read(output / "nbl.json"), done.err

    first, said = made(4)
    assert "training begins with 2 of 3 layers" in said and "2 of 2 layers stay" in said
    assert (first["options"]["fit"], first["tap"], first["fit"]["kind"]) == ("distilled", "normed", "distilled")
    assert [step["layers"] for step in first["goal"]["path"]] == [2] and len(first["replaced_layers"]) == 2
    monkeypatch.setattr(choose, "count_estimated", lambda *_: 1)
    second, said = made(5)
    assert "plan: reused" in said
    assert "1 of 2 layers stay" in said and second["replaced_layers"] == first["goal"]["order"][:1]
    assert set(load_file(output / "maps.safetensors")) < set(load_file(output / "start.safetensors"))
    assert read(output / "model" / "nbl.json")["replaced_layers"] == second["replaced_layers"]
    monkeypatch.setattr(choose, "count_estimated", lambda *_: 2)
    third, said = made(6)
    assert "2 of 2 layers stay" in said and third["replaced_layers"] == first["replaced_layers"]


def test_changing_the_fit_runs_from_the_plan_and_back(same: Same, tmp_path: Path) -> None:
    same, distilled = (*same, *configured(tap="normed")), configured(tap="normed", distill_steps=4)
    first = run(same, tmp_path / "run")
    before = load_file(tmp_path / "run" / "maps.safetensors")
    assert "distill" not in first.err
    changed = run(same, tmp_path / "run", "--fit", "distilled", *distilled)
    assert "calibrate: reused" in changed.err and "distill: done" in changed.err and "verify: done" in changed.err
    again = run(same, tmp_path / "run", "--fit", "distilled", *distilled)
    assert "distill: reused" in again.err and "verify: reused" in again.err
    run(same, tmp_path / "run")
    back = load_file(tmp_path / "run" / "maps.safetensors")
    assert all(np.array_equal(before[n], back[n]) for n in before)
    assert read(tmp_path / "run" / "nbl.json")["fit"] == {"kind": "independent"}


def test_labels_train_otherwise_and_are_recorded(same: Same, tmp_path: Path) -> None:
    distilled = ("--fit", "distilled")
    run(same, tmp_path / "run", *distilled, *configured(distill_steps=4), last="distill")
    before = read(tmp_path / "run" / "distill.json")["train_kl"]
    changed = run(same, tmp_path / "run", *distilled, *configured(distill_steps=4, label_weight=0.5), last="distill")
    assert "plan: reused" in changed.err and "distill: done" in changed.err
    after = read(tmp_path / "run" / "distill.json")["train_kl"]
    assert after[0] == before[0] and after[1:] != before[1:]  # of the same maps and text at first
    assert read(tmp_path / "run" / "nbl.json")["fit"]["label_weight"] == 0.5
    refused = nbl(*same, *distilled, *configured(label_weight=1.5), "--output", tmp_path / "run")
    assert refused.status == 2 and "key label_weight is 1 at most" in refused.err


def test_the_command_line_trains_as_the_library_does() -> None:
    given, own = JobOptions(model="m"), DistillSettings()
    assert (given.label_weight, given.lora_rank) == (own.label_weight, own.lora_rank)
