"""What a run keeps for later is used again only if every part of its key is the same: one test for each key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export.methods.distill.training import DistillSettings
from nbl_export.methods.sums import Sums
from nbl_export.records.inputs import Lazy
from nbl_export.run.stages import calibrate, plan

from ..jobs import job_of

Changes = dict[str, Any]

# -- the unfinished sums of a calibration ----------------------------------------------------------------------

WINDOWS = torch.arange(8 * 64).view(8, 64)


class Collected:
    """Stands in for the sums of a model with one layer."""

    num_layers, size, sizes, count = 1, 2, (2, 2), 64

    def __init__(self, taps: list[str]) -> None:
        self.taps, self.restored = taps, 0

    def layer(self, _index: int) -> dict[str, Sums]:
        ones, square = torch.ones(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
        return dict.fromkeys(self.taps, Sums(64, ones, ones, ones, ones, ones, ones, square, square, square))

    def restore(self, _index: int, _sums: dict[str, Sums]) -> None:
        self.restored += 1


def resumed_batches(
    directory: Path, options: Changes, facts: Changes, windows: torch.Tensor, batches: int, products: str = "float32"
) -> int:
    """Batches that a calibration of these inputs takes from the partial file; it then leaves the file of its own."""
    job = job_of(directory, options, facts)
    declared = calibrate.declare(job)
    assert isinstance(declared, calibrate.CalibrateInputs)
    inputs = dataclasses.replace(declared, windows=Lazy(None, lambda: windows))
    found = calibrate._facts(inputs, batches, products)
    partial, collected = directory / "partial", Collected(found["identity"]["taps"])
    done = calibrate._restored(partial, found, collected)
    assert collected.restored == (1 if done else 0)
    calibrate._write(collected, partial, {**found, "done": 1})
    return done


CALIBRATIONS: dict[str, dict[str, Any]] = {
    "another model": {"facts": {"model": {"fingerprint": "other"}}},
    "another tap": {"options": {"tap": "normed"}},
    "another context": {"windows": WINDOWS.view(16, 32)},
    "fewer tokens": {"windows": WINDOWS[:6]},
    "other tokens": {"windows": WINDOWS + 1},
    "other batches": {"batches": 3},
    "other products": {"products": "bfloat16"},
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
