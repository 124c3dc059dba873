"""Saves the NBL torch model of a run as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

from nbl_export.files import move_into_place, refuse_occupied
from nbl_export.run.deployed import open_finished
from nbl_export.run.progress import Ui

__all__ = ["save"]


def save(output: Path, target: Path | None, ui: Ui, *, force: bool = False) -> Path:
    """Write the model in float32, as it was verified, completely or not at all. The classes in `hf` load it.

    Args:
        target: must be empty or absent; None replaces DIR/nbl-checkpoint.
        force: go on although verification failed.

    Raises:
        NblError: `target` is occupied, the run is not finished or failed, or its model is not available.
        CorruptError: the maps have changed since they were fitted.
    """
    if target is not None:
        refuse_occupied(target)
    from nbl_export.model.hf_classes import save_linearized

    with open_finished(output, ui, force=force) as found, found.run.scratch() as scratch, ui.task("saving"):
        save_linearized(found.model, found.checkpoint, found.maps, found.tap, scratch / "saved")
        return move_into_place(scratch / "saved", target or found.run.path / "nbl-checkpoint")
