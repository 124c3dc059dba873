"""The mode of `quality.py` that distils."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from bed import Bed, log

__all__ = ["distilled"]


def distilled(bed: Bed, options: argparse.Namespace) -> dict[str, Any]:
    """Facts about the closed-form and the distilled maps of one set of layers; --keep DIR saves both."""
    from nbl_export.distill.training import UNLIMITED, Callbacks, DistillSettings, TrainingText, distill
    from nbl_export.options.goals import parse_layers

    layers = parse_layers(options.layers, bed.spec.num_layers)
    assert isinstance(layers, tuple), "name the layers"
    settings = DistillSettings(
        options.steps or UNLIMITED, options.minutes, dtype="auto", lora_rank=options.lora_rank,
        **({"learning_rate": options.rate} if options.rate else {}),
        **({} if options.label_weight is None else {"label_weight": options.label_weight}),
    )  # fmt: skip
    maps = bed.maps("normed", layers, bias=not options.linear)
    before = bed.quality_losses(maps, "normed", {"independent": layers})["independent"]
    busy = time.process_time()
    text = TrainingText(bed.training, bed.held[len(bed.held) // 2 :])
    found = distill(bed.model, maps, "normed", text, settings, Callbacks(say=log))
    spent, every = time.process_time() - busy, settings.check_every
    after = bed.quality_losses(found.maps, "normed", {"distilled": layers})["distilled"]
    for name, kept in (("independent", maps), ("distilled", found.maps)):
        keep(options.keep, name, kept)
    return {
        "layers": list(layers), "settings": vars(settings), "text": bed.text["sha256"],
        "train_tokens": options.train_tokens, "seconds": found.seconds,
        "cpu_seconds": spent,  # of all threads; wall time means little on a busy machine
        "steps": len(found.train_kl), "held_kl": found.held_kl,
        "train_kl": [statistics.fmean(found.train_kl[k : k + every]) for k in range(0, len(found.train_kl), every)],
        "independent": before, "distilled": after,
        "removed": {t: 1 - after[t]["increase"] / before[t]["increase"] for t in before},
    }  # fmt: skip


def keep(directory: Path | None, name: str, maps: dict[int, Any]) -> None:
    from nbl_export.plan.maps_file import save_maps

    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        save_maps(maps, directory / f"{name}.safetensors", "normed")
