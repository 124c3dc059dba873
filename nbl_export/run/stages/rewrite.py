"""The rewrite stage: the NBL graph in a folder that can be deployed alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbl_export import __version__
from nbl_export.files import versions, write_json
from nbl_export.graph.names import MANIFEST
from nbl_export.mixers import layers_below
from nbl_export.options.places import public_facts
from nbl_export.run.job import Job
from nbl_export.run.quantize.rescaled import exported_maps
from nbl_export.run_directory import MAPS_FILE, PACKAGES

__all__ = ["run"]


_DEPLOYED_FACTS = ("schema", "model", "decoder", "options", "calibration", "num_layers", "replaced_layers", "kinds",
                   "tap", "select", "ranks", "fit", "scores", "logits")  # fmt: skip


def run(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export.plan.maps_file import load_maps
    from nbl_export.rewrite.token_table import table_bytes
    from nbl_export.run.stages.common import rows_of

    plan = job.plan
    maps = load_maps(job.run.path / MAPS_FILE, plan.replaced)
    rows = rows_of(job, maps)
    given = exported_maps(job, maps)
    job.engine.replace(job.run.path / "original", out / "model", plan, given, rows)
    facts = {k: job.run.manifest[k] for k in _DEPLOYED_FACTS}
    if job.engine.capabilities.dense_caches:
        facts["cache_layers"] = list(plan.kept)  # layers of the cache ids 0..K-1
    facts = public_facts(facts, job.run.manifest)  # the folder may be published: no paths of this machine
    write_json(out / "model" / MANIFEST, {**facts, "versions": versions(PACKAGES), "nbl_export": __version__})
    table = None if rows is None else {"layers": list(layers_below(maps)), "bytes": table_bytes(out / "model")}
    return {"token_table": table, "versions": {"nbl-export": __version__, **versions(PACKAGES)}}
