"""The distill stage: trains the maps further, from their closed-form start."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nbl_export.files import (
    arrays_sha256,
    file_sha256,
    key_of,
    write_json,
)
from nbl_export.run.job import Job
from nbl_export.run_directory import DISTILL_FILE, MAPS_FILE, START_FILE

__all__ = ["run"]

_STATE = 4  # kind of the saved state; another kind begins anew


def run(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export.distill import settings as settings_of
    from nbl_export.distill import training
    from nbl_export.distill.settings import State
    from nbl_export.parallel import peers as distributed
    from nbl_export.plan.maps_file import load_maps, save_maps

    plan, options = job.plan, job.options
    windows, judging = job.training_windows, job.held_back.choosing
    steps = options.distill_steps or (settings_of.UNLIMITED if options.distill_minutes else settings_of.DEFAULT_STEPS)
    settings = settings_of.DistillSettings(
        steps,
        options.distill_minutes,
        seed=options.seed,
        dtype="auto",
        lora_rank=options.lora_rank,
        label_weight=options.label_weight,
    )
    path = job.run.path / START_FILE
    start = load_maps(path, plan.replaced)
    peers = distributed.current()
    maps = {i: [m.kind, m.tensors()] for i, m in start.items()}
    given = {"maps": maps, "windows": windows, "held": judging, "settings": settings, "tap": plan.tap}
    peers.lead({"work": "distill", "checkpoint": str(job.checkpoint.absolute()), **given})
    peers.agree(None)
    state = State(job.run.partial("distill"), _key(job.fingerprint, path, windows, judging, settings))
    with job.ui.task("distilling") as progress:
        found = training.distill(
            peers.place(job.model), start, plan.tap, settings_of.TrainingText(windows, judging), settings,
            settings_of.Surroundings(progress, lambda s: job.ui.say(f"  {s}"), state, peers),
        )  # fmt: skip
    peers.done()
    save_maps(found.maps, out / MAPS_FILE, plan.tap)
    write_json(out / DISTILL_FILE, {"held_kl": found.held_kl, "train_kl": found.train_kl, "seconds": found.seconds})
    best = min(found.held_kl, key=lambda row: row[1])
    kl = {"held_kl_start": found.held_kl[0][1], "held_kl_best": best[1]}
    how = {"kind": "distilled", "label_weight": settings.label_weight}
    return {"fit": {**how, "steps": len(found.train_kl), "best_step": best[0], **kl}}


def _key(fingerprint: str, maps: Path, windows: Any, judging: Any, settings: Any) -> str:
    """Fingerprint of an unfinished distillation: model, maps at the start, token ids and settings."""
    ids = arrays_sha256({"windows": windows.numpy(), "judging": judging.numpy()})
    return key_of(_STATE, fingerprint, ids, file_sha256(maps), dataclasses.asdict(settings))
