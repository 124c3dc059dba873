"""Saves the NBL torch model of a run as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

from nbl_export.files import move_into_place
from nbl_export.records.results import RungResult
from nbl_export.run.deployed import Finished
from nbl_export.run.progress import Ui

__all__ = ["save"]


def save(found: Finished, target: Path, ui: Ui) -> list[RungResult]:
    """Write the model in float32, as it was verified. The classes in `hf` load it.

    Raises:
        NblError: the model is not available, or its architecture has no class.
    """
    from nbl_export.model.saved.hf_classes import save_linearized

    model, checkpoint = found.model, found.checkpoint
    with found.run.scratch() as scratch, ui.task("saving"):
        save_linearized(model, checkpoint, found.maps, found.tap, scratch / "saved")
        move_into_place(scratch / "saved", target)
    return []
