"""The distill stage: trains the maps further, from their closed-form start."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.files import arrays_sha256, file_sha256, key_of, write_json
from nbl_export.records.inputs import Lazy
from nbl_export.run.resolve import Resolver
from nbl_export.run.stages.common import LeftOut, Place
from nbl_export.run_directory import DISTILL_FILE, MAPS_FILE, START_FILE
from nbl_export.text.windows import Division

__all__ = ["DistillInputs", "declare", "run"]

_STATE = 4  # kind of the saved state; another kind begins anew


@dataclass(frozen=True)
class DistillInputs:
    """What trained maps follow from, beside the maps at the start.

    training: windows of the training text. held_back: their part "choosing" chooses the best step.
    """

    fingerprint: str
    distill_steps: int | None
    distill_minutes: float | None
    seed: int
    lora_rank: int
    label_weight: float
    training: Lazy[Any]
    held_back: Lazy[Division]
    model: Lazy[Any]
    checkpoint: Lazy[Path]


def declare(r: Resolver) -> DistillInputs | LeftOut:
    """The inputs of the stage; left out unless maps are distilled."""
    return r.fill(DistillInputs) if r.options.fit == "distilled" and r.plan.replaced else LeftOut()


def run(inputs: DistillInputs, place: Place, out: Path) -> dict[str, Any]:
    """Write the trained maps and distill.json; returns the facts for the manifest."""
    from nbl_export.distill import training
    from nbl_export.distill.training import State
    from nbl_export.parallel import ranks as distributed
    from nbl_export.plan.maps_file import load_maps, save_maps

    plan, windows, judging = place.plan, inputs.training.value, inputs.held_back.value.choosing
    minutes = inputs.distill_minutes
    steps = inputs.distill_steps or (training.UNLIMITED if minutes else training.DEFAULT_STEPS)
    settings = training.DistillSettings(
        steps, minutes, seed=inputs.seed, dtype="auto", lora_rank=inputs.lora_rank,
        label_weight=inputs.label_weight,
    )  # fmt: skip
    path = place.run.path / START_FILE
    start = load_maps(path, plan.replaced)
    ranks = distributed.current()
    maps = {i: [m.kind, m.tensors()] for i, m in start.items()}
    given = {"maps": maps, "windows": windows, "held": judging, "settings": settings, "tap": plan.tap}
    ranks.lead({"work": "distill", "checkpoint": str(inputs.checkpoint.value.absolute()), **given})
    ranks.agree(None)
    state = State(place.run.partial("distill"), _key(inputs.fingerprint, path, windows, judging, settings))
    with place.ui.task("distilling") as progress:
        found = training.distill(
            ranks.place(inputs.model.value), start, plan.tap, training.TrainingText(windows, judging), settings,
            training.Callbacks(progress, lambda s: place.ui.say(f"  {s}"), state, ranks),
        )  # fmt: skip
    ranks.done()
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
