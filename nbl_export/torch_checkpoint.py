"""The NBL torch model of a run directory as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

from nbl_export.artifacts import RunDirectory, move_into_place, refuse_occupied
from nbl_export.errors import NblError
from nbl_export.job import Job, located
from nbl_export.plan import load_maps
from nbl_export.progress import Ui
from nbl_export.records import JobOptions

__all__ = ["save"]


def save(output: Path, target: Path | None, ui: Ui, *, force: bool = False) -> Path:
    """Write it, complete or not at all, in float32 as it was verified; `hf` has the classes that load it.

    Args:
        target: must not hold anything; DIR/nbl-checkpoint, made anew, where it is None.
        force: go on although verification failed.

    Raises:
        NblError: there is something at `target`, the run is not finished or failed, or its model cannot be had.
        CorruptError: the maps are not what was fitted.
    """
    if target is not None:
        refuse_occupied(target)
    with RunDirectory.open_run(output, create=False) as run:
        if "verify" not in run.stages:
            raise NblError(f"{output} is not finished: run its command again ({run.manifest['command']})")
        if run.manifest["status"] == "failed" and not force:
            raise NblError(f"{output} failed verification; see its verify.json, or use --force to save it all the same")
        for stage in ("plan", "distill"):
            if stage in run.stages:
                run.check(stage)
        from nbl_export.hf import save_linearized

        job = Job(located(JobOptions.from_json(run.manifest["options"]), run), run, ui)
        maps = load_maps(run.path / "maps.safetensors", job.plan.replaced)
        with run.scratch() as scratch, ui.task("saving"):
            save_linearized(job.model, job.checkpoint, maps, job.plan.tap, scratch / "saved")
            return move_into_place(scratch / "saved", target or run.path / "nbl-checkpoint")
