"""The drafts that `--draft` asks for, in a folder of lossless decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbl_export.records.proposers import proposers_of
from nbl_export.run.job import Job

__all__ = ["add_drafts"]


def add_drafts(job: Job, target: Path) -> dict[str, dict[str, Any]]:
    """Add the drafts that the options ask for to the folder."""
    from nbl_export.rewrite.lossless import add_draft

    asked = proposers_of(str(job.options.draft), job.engine.capabilities.proposers)
    wanted = {p.draft for p in asked} - {"ngram"}
    if not wanted:
        return {}
    with job.run.scratch() as scratch, job.ui.task("drafts"):
        directories = {"int4": _int4(job, scratch / "int4")}
        if "nbl" in wanted:
            directories["nbl"] = _nbl(job, directories["int4"], scratch / "nbl")
        return {name: add_draft(directories[name], target, name) for name in sorted(wanted)}


def _int4(job: Job, out: Path) -> Path:
    """The original decoder with int4 matrices."""
    from nbl_export.decoders import build_decoder
    from nbl_export.rewrite import prune_directory

    job.forget_model()
    build_decoder(job.engine.capabilities.sources[0], job.checkpoint, out, "int4")
    prune_directory(out)
    return out


def _nbl(job: Job, int4: Path, out: Path) -> Path:
    """The NBL decoder with int4 matrices."""
    from nbl_export.plan.choose import parse_layers
    from nbl_export.plan.maps_file import load_maps
    from nbl_export.records.plan import Plan
    from nbl_export.rewrite import rewrite
    from nbl_export.run.stages.common import rows_of
    from nbl_export.run.stages.selection import Selection
    from nbl_export.run_directory import MAPS_FILE

    plan = job.plan
    if job.options.draft_layers is None:
        layers, maps = plan.replaced, load_maps(job.run.path / MAPS_FILE, plan.replaced)
    else:
        request, selection = parse_layers(job.options.draft_layers, plan.num_layers), Selection(job)
        layers = tuple(sorted(selection.order(request) if isinstance(request, int) else request))
        maps = selection.maps_of(layers)
    rewrite(int4, out, Plan(plan.num_layers, layers, tap=plan.tap), maps, rows_VD=rows_of(job, maps))
    return out
