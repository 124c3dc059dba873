"""The drafts that `--draft` asks for, in a folder of lossless decoding."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from nbl_export.errors import RefusalError
from nbl_export.formats.gguf.blocks import is_known
from nbl_export.model.checkpoint import gguf_file
from nbl_export.options.options import GGUF
from nbl_export.records.proposers import proposers_of
from nbl_export.run.job import Job
from nbl_export.targets.base import ExportSettings

__all__ = ["add_drafts", "codes_for_drafts"]

_MOST_BITS = 7  # a weight of a file whose codes make a cheap draft; int4 has 4.5 to 5


def add_drafts(job: Job, target: Path) -> dict[str, dict[str, Any]]:
    """Add the drafts that the options ask for to the folder."""
    asked = proposers_of(str(job.options.draft), job.engine.capabilities.proposers)
    wanted = {p.draft for p in asked} - {"ngram"}
    if not wanted:
        return {}
    with job.run.scratch() as scratch, job.ui.task("drafts"):
        directories = {"int4": _int4(job, scratch / "int4")}
        if "nbl" in wanted:
            directories["nbl"] = _nbl(job, directories["int4"], scratch / "nbl")
        return {name: job.engine.add_draft(directories[name], target, name) for name in sorted(wanted)}


def codes_for_drafts(job: Job) -> Path | None:
    """The GGUF file whose codes the draft gets instead of int4: they have the original's values, so more is accepted.

    None if there is no such file, if it cannot be taken over, or if its codes have as many bits as int8.
    """
    file, options = job.source.gguf, job.options
    if file is None or options.requantize or (options.engine, options.provider) != ("ort", "cpu"):
        return None
    matrices = [t for t in gguf_file.reader(file).tensors if len(t.shape) == 2]
    bits = 8 * sum(int(t.n_bytes) for t in matrices) / sum(int(t.n_elements) for t in matrices)
    known = all(is_known(t.tensor_type.name) for t in matrices)
    return file if known and bits <= _MOST_BITS else None


def _int4(job: Job, out: Path) -> Path:
    """The original decoder with int4 matrices, or with the codes of its file."""
    job.forget_model()
    codes, source = codes_for_drafts(job), job.engine.capabilities.source
    coarse = ExportSettings(source, "int4")
    try:
        job.engine.export(job.checkpoint, out, coarse if codes is None else ExportSettings(source, GGUF, gguf=codes))
    except RefusalError as refused:
        if codes is None:
            raise
        job.ui.say(f"  drafts have int4 matrices, since the codes of {codes} do not fit: {refused.reason}")
        shutil.rmtree(out)
        job.engine.export(job.checkpoint, out, coarse)
    job.engine.keep_last_token(out)
    return out


def _nbl(job: Job, int4: Path, out: Path) -> Path:
    """The NBL decoder with the matrices of `int4`."""
    from nbl_export.options.goals import parse_layers
    from nbl_export.plan.maps_file import load_maps
    from nbl_export.records.plan import Plan
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
    job.engine.replace(int4, out, Plan(plan.num_layers, layers, tap=plan.tap), maps, rows_of(job, maps))
    return out
