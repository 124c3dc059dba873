"""The modes of `quality.py` that distil."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bed import Bed, log
from choices import cost_model, dropped, judged

__all__ = ["distilled", "ladder"]

TRAINING = ("layers", "settings", "text", "train_tokens", "seconds", "cpu_seconds", "steps", "held_kl", "train_kl")


def distilled(bed: Bed, options: argparse.Namespace, orders: Mapping[str, Any]) -> dict[str, Any]:
    """Facts about the independent and distilled maps of one set of layers."""
    from nbl_export.plan.choose import parse_layers

    select, _, count = options.layers.partition(":")
    if count:
        layers = tuple(sorted(orders[select][: int(count)]))
    else:
        layers = parse_layers(options.layers, len(bed.moments["normed"]))
    assert isinstance(layers, tuple), "name the layers"
    facts, maps = trained(bed, options, layers)
    if options.keep:
        keep(options.keep, "independent", bed.maps("normed", layers, bias=not options.linear))
        keep(options.keep, "distilled", maps)
    return facts


def keep(directory: Path, name: str, maps: dict[int, Any]) -> None:
    from nbl_export.plan.maps_file import save_maps

    directory.mkdir(parents=True, exist_ok=True)
    save_maps(maps, directory / f"{name}.safetensors", "normed")


def kept(directory: Path, count: int) -> Path:
    return directory / f"{count}.json"


def trained(bed: Bed, options: argparse.Namespace, layers: tuple[int, ...]) -> tuple[dict[str, Any], dict[int, Any]]:
    """Facts about the independent and the distilled maps of layers, and the distilled maps.

    With --keep DIR, maps of an earlier ladder with the same layers and settings are only measured, not trained again.
    """
    from nbl_export.distill.settings import UNLIMITED, DistillSettings, Surroundings, TrainingText
    from nbl_export.distill.training import distill
    from nbl_export.plan.maps_file import load_maps

    settings = DistillSettings(
        options.steps or UNLIMITED, options.minutes, dtype="auto", lora_rank=options.lora_rank,
        **({"learning_rate": options.rate} if options.rate else {}),
        **({} if options.label_weight is None else {"label_weight": options.label_weight}),
    )  # fmt: skip
    maps = bed.maps("normed", layers, bias=not options.linear)
    before = bed.prices(maps, "normed", {"independent": layers})["independent"]
    wanted = {"layers": list(layers), "settings": vars(settings), "text": bed.text["sha256"]}
    wanted |= {"train_tokens": options.train_tokens}
    earlier = found_earlier(options, wanted)
    if earlier is None:
        held = bed.held[len(bed.held) // 2 :]
        busy = time.process_time()
        found = distill(bed.model, maps, "normed", TrainingText(bed.training, held), settings, Surroundings(say=log))
        every = settings.check_every
        facts = {
            **wanted,
            "seconds": found.seconds,
            "cpu_seconds": time.process_time() - busy,  # of all threads; wall time means little on a busy machine
            "steps": len(found.train_kl),
            "held_kl": found.held_kl,
            "train_kl": [statistics.fmean(found.train_kl[k : k + every]) for k in range(0, len(found.train_kl), every)],
        }
        maps = found.maps
    else:
        facts, maps = earlier, load_maps(options.keep / f"{len(layers)}.safetensors", layers)
    after = bed.prices(maps, "normed", {"distilled": layers})["distilled"]
    removed = {t: 1 - after[t]["increase"] / before[t]["increase"] for t in before}
    log(f"removed: { {t: round(v, 3) for t, v in removed.items()} }")
    return {**facts, "independent": before, "distilled": after, "removed": removed}, maps


def found_earlier(options: argparse.Namespace, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Facts of the same distillation in an earlier ladder's directory, or None."""
    at = options.keep and kept(options.keep, len(wanted["layers"]))
    if options.what != "ladder" or not at or not at.exists():
        return None
    facts = json.loads(at.read_text(encoding="utf-8"))
    return {k: facts[k] for k in TRAINING} if all(facts.get(k) == v for k, v in wanted.items()) else None


def ladder(bed: Bed, options: argparse.Namespace) -> dict[str, Any]:
    """Results of nbl-export's own layers at several counts, and the paper's layers at these counts."""
    from nbl_export.cost.model import map_sizes
    from nbl_export.plan import lmmse
    from nbl_export.plan.choose import ranked

    counts = [int(n) for n in options.counts.split(",")]
    maps = bed.maps("normed", range(len(bed.moments["residual"])))
    order, _ = judged(bed, maps, max(counts), "efficient")
    costs, sizes = cost_model(bed), map_sizes(maps)
    rows = {}
    for count in counts:
        mix = tuple(sorted(order.layers[:count]))
        speed = costs.speedup_of_sizes({i: sizes[i] for i in mix}).prefill
        gone = bed.prices(dropped(maps), "normed", {"drop": mix})["drop"]
        facts, found = trained(bed, options, mix)
        rows[count] = {"modelled_prefill": speed, "drop": gone, **facts}
        if options.keep:
            keep(options.keep, str(count), found)
            kept(options.keep, count).write_text(json.dumps(rows[count], indent=1), encoding="utf-8")
    scores = [lmmse.score(m, i) for i, m in enumerate(bed.moments["residual"])]
    cca = {count: sorted(ranked(scores, "cca")[:count]) for count in counts}
    paper = {
        count: {"layers": mix, "modelled_prefill": costs.speedup_of_sizes({i: sizes[i] for i in mix}).prefill}
        for count, mix in cca.items()
    }
    return {"order": list(order.layers), "losses": [step.loss for step in order.steps], "paper": paper, "rows": rows}
