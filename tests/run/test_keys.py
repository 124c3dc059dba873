"""What a run keeps for later is used again only if every part of its key is the same: one test for each key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export.methods.distill.training import DistillSettings
from nbl_export.methods.sums_file import SumsFile, SumsWriter
from nbl_export.records.inputs import Lazy
from nbl_export.run.stages import calibrate, plan

from ..jobs import job_of

Changes = dict[str, Any]

# -- the unfinished sums of a calibration ----------------------------------------------------------------------

WINDOWS = torch.arange(8 * 64).view(8, 64)


class Collected:
    """Stands in for the sums of a model."""

    restored = 0

    def save(self, path: Path, facts: dict[str, Any]) -> None:
        with SumsWriter(path, {**facts, "count": 64}, {"sum": (2,)}) as file:
            file.write({"sum": torch.ones(2, dtype=torch.float64)})

    def restore(self, file: SumsFile) -> None:
        file.require({"sum": (2,)})
        self.restored += 1


def resumed_batches(
    directory: Path, options: Changes, facts: Changes, windows: torch.Tensor, batches: int, bf16: bool = False
) -> int:
    """Batches that a calibration of these inputs takes from the partial file; it then leaves the file of its own."""
    job = job_of(directory, options, facts)
    declared = calibrate.declare(job)
    assert isinstance(declared, calibrate.CalibrateInputs)
    inputs = dataclasses.replace(declared, windows=Lazy(None, lambda: windows))
    found = calibrate._facts(inputs, windows, batches, bf16)
    partial, collected = directory / "partial", Collected()
    done = calibrate._restored(partial, found, collected)
    assert collected.restored == (1 if done else 0)
    collected.save(partial, {**found, "done": 1})
    return done


CALIBRATIONS: dict[str, dict[str, Any]] = {
    "another model": {"facts": {"model": {"fingerprint": "other"}}},
    "another tap": {"options": {"tap": "normed"}},
    "another context": {"windows": WINDOWS.view(16, 32)},
    "fewer tokens": {"windows": WINDOWS[:6]},
    "other tokens": {"windows": WINDOWS + 1},
    "other batches": {"batches": 3},
    "other products": {"bf16": True},
}


@pytest.mark.parametrize("change", CALIBRATIONS)
def test_a_calibration_resumes_from_its_own_sums_alone(change: str, tmp_path: Path) -> None:
    same: dict[str, Any] = {"options": {}, "facts": {}, "windows": WINDOWS, "batches": 4}
    assert resumed_batches(tmp_path, **same) == 0
    assert resumed_batches(tmp_path, **same) == 1
    assert resumed_batches(tmp_path, **{**same, **CALIBRATIONS[change]}) == 0


# -- an unfinished distillation --------------------------------------------------------------------------------


def distilled(directory: Path, maps: bytes = b"maps", **changes: Any) -> str:
    (directory / "maps").write_bytes(maps)
    inputs = {
        "fingerprint": "model",
        "windows": WINDOWS[:6],
        "early_stopping": WINDOWS[6:],
        "settings": DistillSettings(),
    }
    return plan._state_key(maps=directory / "maps", **{**inputs, **changes})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(DistillSettings)])
def test_a_distillation_of_other_settings_starts_anew(name: str, tmp_path: Path) -> None:
    changed: Any = {name: "bf16" if name == "dtype" else 0.375}
    assert distilled(tmp_path, settings=dataclasses.replace(DistillSettings(), **changed)) != distilled(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "other"},
        {"maps": b"others"},
        {"windows": WINDOWS[:6] + 1},
        {"windows": WINDOWS[:6].reshape(12, 32)},
        {"early_stopping": WINDOWS[6:] + 1},
        {"windows": WINDOWS[:5], "early_stopping": WINDOWS[5:]},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_distillation_of_other_inputs_starts_anew(change: Changes, tmp_path: Path) -> None:
    assert distilled(tmp_path, **change) != distilled(tmp_path)
